{{/* What the Job's name is a sum of. */}}
{{- define "sliceserve.jobSpec" -}}
{{- $source := include "sliceserve.source" . -}}
{{- include "sliceserve.refuse" (dict "where" "slice.extraArgs" "arguments" .Values.slice.extraArgs "options" (include "sliceserve.sliceOptions" . | fromYamlArray)) }}
{{- include "sliceserve.refuseSecrets" (dict "where" "slice.extraEnv" "environment" .Values.slice.extraEnv) -}}
backoffLimit: {{ .Values.slice.backoffLimit }}
{{- /* Kubernetes refuses it beside OnFailure. */}}
{{- if empty .Values.model.download.image }}
podFailurePolicy:
  rules:
    # One that is evicted has not failed.
    - action: Ignore
      onPodConditions:
        - type: DisruptionTarget
          status: "True"
    # What is wrong with an argument is wrong the next time too; a signal, machine or network end with others.
    - action: FailJob
      onExitCodes:
        containerName: slice
        operator: In
        values: [2]
      # Nothing, but the schema of Kubernetes 1.28 requires it.
      onPodConditions: []
{{- end }}
template:
  metadata:
    labels:
      {{- include "sliceserve.selectorLabels" . | nindent 6 }}
      app.kubernetes.io/component: slice
    {{- with .Values.slice.podAnnotations }}
    annotations:
      {{- toYaml . | nindent 6 }}
    {{- end }}
  spec:
    # The pods of failed tries stay, with their logs; but a download is lost with its pod.
    restartPolicy: {{ empty .Values.model.download.image | ternary "Never" "OnFailure" }}
    serviceAccountName: {{ include "sliceserve.fullname" . }}-slice
    automountServiceAccountToken: false
    enableServiceLinks: false
    {{- with .Values.image.pullSecrets }}
    imagePullSecrets:
      {{- range . }}
      - name: {{ . | quote }}
      {{- end }}
    {{- end }}
    {{- $onGpus := include "sliceserve.slicesOnGpus" . }}
    {{- with .Values.slice.runtimeClassName | default (empty $onGpus | ternary "" .Values.server.runtimeClassName) }}
    runtimeClassName: {{ . | quote }}
    {{- end }}
    {{- with .Values.slice.priorityClassName }}
    priorityClassName: {{ . | quote }}
    {{- end }}
    {{- with .Values.slice.nodeSelector }}
    nodeSelector:
      {{- toYaml . | nindent 6 }}
    {{- end }}
    {{- with .Values.slice.tolerations }}
    tolerations:
      {{- toYaml . | nindent 6 }}
    {{- end }}
    {{- with include "sliceserve.affinity" (dict "root" . "affinity" .Values.slice.affinity) }}
    {{- . | nindent 4 }}
    {{- end }}
    securityContext:
      {{- include "sliceserve.podSecurityContext" . | nindent 6 }}
    {{- with .Values.model.download }}
    {{- if .image }}
    initContainers:
      - name: download
        image: {{ .image | quote }}
        {{- with .command }}
        # Where the Job will find its slice it needs no model.
        command:
          - sh
          - -c
          - |
            [ -d "$0" ] && { echo "$0 is there already"; exit 0; }
            exec "$@"
          - {{ include "sliceserve.directory" $ }}
          {{- toYaml . | nindent 10 }}
        {{- end }}
        {{- with .args }}
        args:
          {{- toYaml . | nindent 10 }}
        {{- end }}
        {{- with .existingSecret }}
        envFrom:
          - secretRef:
              name: {{ . | quote }}
        {{- end }}
        env:
          # Its root is read-only.
          - name: HOME
            value: /tmp
          # For an image whose own entrypoint is run, and must look itself.
          - name: SLICE_DIRECTORY
            value: {{ include "sliceserve.directory" $ }}
          {{- with $.Values.slice.extraEnv }}
          {{- toYaml . | nindent 10 }}
          {{- end }}
        resources:
          {{- toYaml $.Values.slice.resources | nindent 10 }}
        securityContext:
          {{- include "sliceserve.securityContext" $ | nindent 10 }}
        volumeMounts:
          - name: checkpoints
            mountPath: /checkpoints
            readOnly: true
          - name: model
            mountPath: /model
          - name: tmp
            mountPath: /tmp
    {{- end }}
    {{- end }}
    containers:
      - name: slice
        image: {{ include "sliceserve.image" . | quote }}
        imagePullPolicy: {{ .Values.image.pullPolicy | quote }}
        # The directory appears only when it is complete; a restarted Job goes on where it stopped.
        command:
          - sh
          - -c
          - |
            [ -d "$0" ] && { echo "$0 is there already"; exit 0; }
            exec sliceserve slice "$@" --output "$0" --restart
          - {{ include "sliceserve.directory" . }}
        args:
          - {{ $source | quote }}
          {{- if float64 .Values.slice.targetParams }}
          - --target-params
          - {{ .Values.slice.targetParams | quote }}
          {{- else }}
          - --fraction
          - {{ .Values.slice.fraction | quote }}
          {{- end }}
          # Said, so that a Job whose GPU is not found ends, rather than slice on the CPU.
          - --device
          - {{ empty $onGpus | ternary "cpu" "cuda" }}
          {{- with .Values.model.revision }}
          - --revision
          - {{ . | quote }}
          {{- end }}
          {{- range .Values.slice.extraArgs }}
          - {{ . | quote }}
          {{- end }}
        env:
          # The user has no entry in the image's passwd, and PyTorch asks for a name.
          - name: USER
            value: sliceserve
          - name: HOME
            value: /tmp
          # Beside the checkpoints, so that a restart need not fetch the model again.
          - name: HF_HOME
            value: /checkpoints/.hub
          {{- with .Values.model.hubToken }}
          {{- if .existingSecret }}
          - name: HF_TOKEN
            valueFrom:
              secretKeyRef:
                name: {{ .existingSecret | quote }}
                key: {{ .key | quote }}
          {{- end }}
          {{- end }}
          {{- with .Values.slice.extraEnv }}
          {{- toYaml . | nindent 10 }}
          {{- end }}
        resources:
          {{- include "sliceserve.resources" (dict "root" . "resources" .Values.slice.resources "gpus" .Values.slice.gpus) | nindent 10 }}
        securityContext:
          {{- include "sliceserve.securityContext" . | nindent 10 }}
        volumeMounts:
          - name: checkpoints
            mountPath: /checkpoints
          - name: tmp
            mountPath: /tmp
          {{- if not .Values.model.hub }}
          - name: model
            mountPath: /model
            readOnly: true
          {{- end }}
    volumes:
      - name: checkpoints
        persistentVolumeClaim:
          claimName: {{ include "sliceserve.claim" . | quote }}
      - name: tmp
        emptyDir:
          sizeLimit: 10Gi
      {{- if .Values.model.claim.name }}
      - name: model
        persistentVolumeClaim:
          claimName: {{ .Values.model.claim.name | quote }}
          readOnly: true
      {{- else if .Values.model.image.reference }}
      - name: model
        image:
          reference: {{ .Values.model.image.reference | quote }}
          pullPolicy: {{ .Values.image.pullPolicy | quote }}
      {{- else if .Values.model.download.image }}
      - name: model
        emptyDir:
          sizeLimit: {{ .Values.model.download.size | quote }}
      {{- end }}
{{- end -}}
