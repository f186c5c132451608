{{/*
Options of `sliceserve serve` that the chart answers for, of a dict of root and role: what it gives of
each (`give`), other names of it, of which one that ends in "-" stands for all that begin so (`also`),
and what to do instead of naming it in server.extraArgs (`instead`). Where they have no `give`, nothing
that a chart gives goes with them.
*/}}
{{- define "sliceserve.options" -}}
{{- $root := .root }}
{{- $server := $root.Values.server -}}
- give: --host=0.0.0.0
  instead: probes and Service need all addresses; networkPolicy.ingressNamespaces and networkPolicy.extraIngress say who reaches the server
- give: --port={{ $server.port }}
  instead: set server.port
- also: [--uds]
  instead: probes and Service ask a port, which is server.port
- give: {{ printf "--served-model-name=%s" (include "sliceserve.servedName" $root) | quote }}
  instead: set model.servedName
- give: --tensor-parallel-size={{ $server.tensorParallelSize }}
  also: [-tp, --prefill-context-parallel-size, -pcp]
  instead: set server.tensorParallelSize, by which GPUs are requested
- give: --pipeline-parallel-size={{ $server.pipelineParallelSize }}
  also: [-pp]
  instead: set server.pipelineParallelSize, by which GPUs are requested
- also: [--data-parallel-, --no-data-parallel-, -dp, -dpn, -dpr, -dpl, -dpa, -dpp, -dpb, -dph, -dpe, -dpm]
  instead: set server.replicas, or autoscaling.kind, for more servers of the model
- {{ if eq .role "leader" }}give: --distributed-executor-backend=ray
  {{ end }}also: [--nnodes, -n, --node-rank, -r, --master-addr, --master-port, --headless]
  instead: set server.nodes, which makes a group of pods with Ray
- give: --drain-timeout={{ $server.drainTimeoutSeconds }}
  instead: set server.drainTimeoutSeconds, which the pods' grace period follows
{{- /* Before the startup probe gives up, which counts from the container's start and so the imports
too: the log says what the start was doing. */}}
- give: --start-timeout={{ max (mul $server.startupMinutes 30) (sub (mul $server.startupMinutes 60) 180) }}
  instead: set server.startupMinutes, which the startup probe follows
{{- if $server.maxModelLen }}
- give: --max-model-len={{ int $server.maxModelLen }}
  instead: set server.maxModelLen
{{- end }}
{{- $keys := "set auth.existingSecret, with the keys in a Secret" }}
{{- if $root.Values.auth.existingSecret }}
- give: {{ printf "--api-key-file=/etc/sliceserve/key/%s" $root.Values.auth.key | quote }}
  instead: {{ $keys }}
- give: --metrics-public
  also: [--no-metrics-public]
  instead: Prometheus has no key; networkPolicy.ingressNamespaces and networkPolicy.extraIngress say who reaches the server
{{- else }}
- give: --insecure
  instead: {{ $keys }}
{{- end }}
- also: [--api-key, --api-key-file, --insecure, --no-insecure]
  instead: {{ $keys }}
- also: [--ssl-, --enable-ssl-refresh, --no-enable-ssl-refresh]
  instead: probes, Service and monitors ask the pods for plain HTTP; TLS ends at the Ingress (ingress.tlsSecret) or at the gateway of httpRoute
{{- end -}}

{{/* Options of `sliceserve slice` that the chart answers for, as those above. */}}
{{- define "sliceserve.sliceOptions" -}}
- also: [--output, --restart]
  instead: the chart names a directory by all that makes one slice another
- also: [--fraction, --target-params]
  instead: set slice.fraction or slice.targetParams
- also: [--device]
  instead: set slice.gpus
- also: [--revision]
  instead: set model.revision
{{- end -}}

{{/* Fails if arguments have one of some options; of a dict of both, and of the value that they are (`where`). */}}
{{- define "sliceserve.refuse" -}}
{{- $where := .where }}
{{- $options := .options }}
{{- range $argument := .arguments }}
{{- /* As vLLM reads it: _ is -, and an option may be shortened. Without its value, which may be a key. */}}
{{- $name := regexFind "^--?[^-=\\s][^=\\s]*" $argument }}
{{- range $option := ternary $options list (ne $name "") }}
{{- range concat ($option.also | default list) ($option.give | default "" | splitList "=" | first | list | compact) }}
{{- if or (hasPrefix (replace "_" "-" $name) .) (and (hasSuffix "-" .) (hasPrefix . (replace "_" "-" $name))) }}
{{- fail (printf "%s must not have %s: %s" $where $name $option.instead) }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}
{{- end -}}

{{/* Fails if an environment holds a secret itself; of a dict of it and of the value that it is (`where`). */}}
{{- define "sliceserve.refuseSecrets" -}}
{{- $where := .where }}
{{- range .environment }}
{{- if regexMatch "(?i)^(SLICESERVE_API_KEY(_FILE)?|VLLM_API_KEY)$" .name }}
{{- fail (printf "%s must not have %s: set auth.existingSecret, with the keys in a Secret" $where .name) }}
{{- end }}
{{- if and .value (regexMatch "(?i)(token|secret|password|passphrase|credential|api_?key|access_?key)s?$" .name) }}
{{- fail (printf "%s must not have the value of %s: give it valueFrom, with the value in a Secret" $where .name) }}
{{- end }}
{{- end }}
{{- end -}}

{{/* The server's arguments, of the same dict. */}}
{{- define "sliceserve.arguments" -}}
{{- $options := include "sliceserve.options" . | fromYamlArray }}
{{- include "sliceserve.refuse" (dict "where" "server.extraArgs" "arguments" .root.Values.server.extraArgs "options" $options) }}
{{- range $options }}
{{- with .give }}
- {{ . | quote }}
{{- end }}
{{- end }}
{{- range .root.Values.server.extraArgs }}
- {{ . | quote }}
{{- end }}
{{- end -}}
