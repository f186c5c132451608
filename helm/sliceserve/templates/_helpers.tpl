{{- define "sliceserve.fullname" -}}
{{- if contains .Chart.Name .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name .Chart.Name | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "sliceserve.selectorLabels" -}}
app.kubernetes.io/name: {{ .Chart.Name | quote }}
app.kubernetes.io/instance: {{ .Release.Name | quote }}
{{- end -}}

{{- define "sliceserve.nodesSelector" -}}
matchLabels:
  {{- include "sliceserve.selectorLabels" . | nindent 2 }}
matchExpressions:
  - key: app.kubernetes.io/component
    operator: In
    values: [server, worker]
{{- end -}}

{{- define "sliceserve.labels" -}}
{{ include "sliceserve.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service | quote }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{- define "sliceserve.image" -}}
{{- with .Values.image -}}
{{- if .digest -}}{{ .repository }}@{{ .digest }}{{- else -}}{{ .repository }}:{{ .tag | default $.Chart.AppVersion }}{{- end -}}
{{- end -}}
{{- end -}}

{{/* What `sliceserve slice` is given as MODEL; exactly one source must be named. */}}
{{- define "sliceserve.source" -}}
{{- $model := .Values.model -}}
{{- $sources := list -}}
{{- with $model.hub }}{{ $sources = append $sources . }}{{ end -}}
{{- if $model.claim.name }}{{ $sources = append $sources (printf "/model/%s" $model.claim.path | trimSuffix "/") }}{{ end -}}
{{- if $model.image.reference }}{{ $sources = append $sources (printf "/model/%s" $model.image.path | trimSuffix "/") }}{{ end -}}
{{- if $model.download.image }}{{ $sources = append $sources "/model" }}{{ end -}}
{{- if ne (len $sources) 1 -}}
{{- fail (printf "name one model: one of model.hub, model.claim.name, model.image.reference and model.download.image must be set, not %d" (len $sources)) -}}
{{- end -}}
{{- if and $model.revision (not $model.hub) -}}
{{- fail "model.revision needs model.hub" -}}
{{- end -}}
{{- if and $model.image.reference (semverCompare "<1.31.0-0" .Capabilities.KubeVersion.Version) -}}
{{- fail (printf "model.image.reference needs Kubernetes 1.31 or newer, and this is %s" .Capabilities.KubeVersion.Version) -}}
{{- end -}}
{{- first $sources -}}
{{- end -}}

{{/* Everything that makes one slice another: names its directory. */}}
{{- define "sliceserve.slice" -}}
{{- $download := pick .Values.model.download "command" "args" -}}
{{- $model := merge (dict "download" $download) (omit .Values.model "servedName" "hubToken" "download" "revision") -}}
{{- /* Only where it is set: slices from before there was one keep their names. */}}
{{- with .Values.model.revision }}{{ $_ := set $model "revision" . }}{{ end -}}
{{- /* --set makes strings of numbers with a point. */}}
{{- $sizes := dict "fraction" (float64 .Values.slice.fraction) "target" (float64 .Values.slice.targetParams) -}}
{{- merge $sizes (dict "model" $model "args" .Values.slice.extraArgs) | toJson | sha256sum | trunc 10 -}}
{{- end -}}

{{/* With everything the Job is made of, since a Job cannot be changed: a new one finds the slice there. */}}
{{- define "sliceserve.job" -}}
{{- printf "%s-slice-%s" (include "sliceserve.fullname" .) (include "sliceserve.jobSpec" . | sha256sum | trunc 10) -}}
{{- end -}}

{{- define "sliceserve.directory" -}}
/checkpoints/{{ include "sliceserve.slice" . }}
{{- end -}}

{{- define "sliceserve.servedName" -}}
{{- .Values.model.servedName | default (include "sliceserve.source" . | base) -}}
{{- end -}}

{{- define "sliceserve.claim" -}}
{{- .Values.checkpoints.existingClaim | default (printf "%s-checkpoints" (include "sliceserve.fullname" .)) -}}
{{- end -}}

{{- define "sliceserve.ranks" -}}
{{- mul .Values.server.tensorParallelSize .Values.server.pipelineParallelSize -}}
{{- end -}}

{{/* GPUs of one pod. */}}
{{- define "sliceserve.gpus" -}}
{{- $ranks := include "sliceserve.ranks" . | int -}}
{{- $nodes := .Values.server.nodes | int -}}
{{- if mod $ranks $nodes -}}
{{- fail (printf "server.nodes is %d, which does not divide server.tensorParallelSize × server.pipelineParallelSize = %d" $nodes $ranks) -}}
{{- end -}}
{{- div $ranks $nodes -}}
{{- end -}}

{{/* Not the name of the Service: the controller makes one of the group's name, without an address. */}}
{{- define "sliceserve.group" -}}
{{- include "sliceserve.fullname" . }}-group
{{- end -}}

{{/* What autoscaling scales. */}}
{{- define "sliceserve.scaled" -}}
{{- if eq (int .Values.server.nodes) 1 -}}
apiVersion: apps/v1
kind: Deployment
name: {{ include "sliceserve.fullname" . }}
{{- else -}}
apiVersion: leaderworkerset.x-k8s.io/v1
kind: LeaderWorkerSet
name: {{ include "sliceserve.group" . }}
{{- end }}
{{- end -}}

{{/* Whether the Job runs on GPUs. */}}
{{- define "sliceserve.slicesOnGpus" -}}
{{- if and .Values.slice.gpus .Values.server.gpuResource }}true{{ end -}}
{{- end -}}

{{/*
An affinity, of a dict of root and affinity. A ReadWriteOnce volume is attached to one node: the Job and
new pods of the server must be where its pods are.
*/}}
{{- define "sliceserve.affinity" -}}
{{- $affinity := deepCopy .affinity -}}
{{- with .root.Values -}}
{{- $oneNode := and (not .checkpoints.existingClaim) (eq .checkpoints.accessMode "ReadWriteOnce") -}}
{{- if and $oneNode .server.replicas (not (hasKey $affinity "podAffinity")) -}}
{{- $labels := merge (dict "app.kubernetes.io/component" "server") (include "sliceserve.selectorLabels" $.root | fromYaml) -}}
{{- $term := dict "topologyKey" "kubernetes.io/hostname" "labelSelector" (dict "matchLabels" $labels) -}}
{{- $_ := set $affinity "podAffinity" (dict "requiredDuringSchedulingIgnoredDuringExecution" (list $term)) -}}
{{- end -}}
{{- end -}}
{{- with $affinity -}}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end -}}
{{- end -}}

{{- define "sliceserve.podSecurityContext" -}}
runAsNonRoot: true
{{- with .Values.podSecurity.user }}
runAsUser: {{ int64 . }}
runAsGroup: {{ int64 . }}
fsGroup: {{ int64 . }}
{{- end }}
fsGroupChangePolicy: OnRootMismatch
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{- define "sliceserve.securityContext" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end -}}

{{/* Resources with GPUs: a dict of root, resources and gpus. */}}
{{- define "sliceserve.resources" -}}
{{- $resources := deepCopy .resources -}}
{{- if and .gpus .root.Values.server.gpuResource -}}
{{- $limits := merge (dict .root.Values.server.gpuResource (toString .gpus)) ($resources.limits | default dict) -}}
{{- $_ := set $resources "limits" $limits -}}
{{- end -}}
{{- toYaml $resources -}}
{{- end -}}
