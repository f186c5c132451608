{{/*
A pod of the server: a dict of root and role. The role is alone, or with several nodes leader, which
runs the server and Ray's head, or worker, which lends its GPUs.
*/}}
{{- define "sliceserve.pod" -}}
{{- $root := .root }}
{{- $server := $root.Values.server }}
{{- $ray := 6379 }}
{{- /* Ray's own choice, a share of the memory, would not fit the shared memory. */}}
{{- $store := "--object-store-memory=268435456" -}}
metadata:
  labels:
    # Not the chart's version: another chart alone must not load all models anew.
    {{- include "sliceserve.selectorLabels" $root | nindent 4 }}
    app.kubernetes.io/component: {{ eq .role "worker" | ternary "worker" "server" }}
  {{- with $server.podAnnotations }}
  annotations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  serviceAccountName: {{ include "sliceserve.fullname" $root }}-server
  automountServiceAccountToken: false
  enableServiceLinks: false
  terminationGracePeriodSeconds: {{ add $server.preStopSeconds $server.drainTimeoutSeconds 40 }}
  {{- with $root.Values.image.pullSecrets }}
  imagePullSecrets:
    {{- range . }}
    - name: {{ . | quote }}
    {{- end }}
  {{- end }}
  {{- with $server.runtimeClassName }}
  runtimeClassName: {{ . | quote }}
  {{- end }}
  {{- with $server.priorityClassName }}
  priorityClassName: {{ . | quote }}
  {{- end }}
  {{- with $server.nodeSelector }}
  nodeSelector:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $server.tolerations }}
  tolerations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with include "sliceserve.affinity" (dict "root" $root "affinity" $server.affinity) }}
  {{- . | nindent 2 }}
  {{- end }}
  {{- with and (ne .role "worker") $server.spreadOver }}
  topologySpreadConstraints:
    - maxSkew: 1
      topologyKey: {{ . | quote }}
      whenUnsatisfiable: ScheduleAnyway
      labelSelector:
        matchLabels:
          {{- include "sliceserve.selectorLabels" $root | nindent 10 }}
          app.kubernetes.io/component: server
  {{- end }}
  securityContext:
    {{- include "sliceserve.podSecurityContext" $root | nindent 4 }}
  initContainers:
    - name: wait-for-checkpoint
      image: {{ include "sliceserve.image" $root | quote }}
      imagePullPolicy: {{ $root.Values.image.pullPolicy | quote }}
      command: [sh, -c, 'until [ -d "$0" ]; do sleep 5; done', {{ include "sliceserve.directory" $root }}]
      resources:
        requests:
          cpu: 10m
          memory: 16Mi
        limits:
          memory: 64Mi
      securityContext:
        {{- include "sliceserve.securityContext" $root | nindent 8 }}
      volumeMounts:
        - name: checkpoints
          mountPath: /checkpoints
          readOnly: true
  containers:
    - name: server
      image: {{ include "sliceserve.image" $root | quote }}
      imagePullPolicy: {{ $root.Values.image.pullPolicy | quote }}
      {{- if eq .role "worker" }}
      command:
        - sh
        - -c
        - |
          until ray health-check --address "$0"; do sleep 2; done
          exec ray start --address "$0" {{ $store }} --block
        - $(LWS_LEADER_ADDRESS):{{ $ray }}
      {{- else }}
      {{- if eq .role "leader" }}
      command:
        - sh
        - -c
        - ray start --head --port={{ $ray }} {{ $store }} --include-dashboard=false && exec sliceserve serve "$0" "$@"
        - {{ include "sliceserve.directory" $root }}
      {{- else }}
      command: [sliceserve, serve, {{ include "sliceserve.directory" $root }}]
      {{- end }}
      args:
        {{- include "sliceserve.arguments" . | nindent 8 }}
      {{- end }}
      env:
        # The user has no entry in the image's passwd, and PyTorch asks for a name.
        - name: USER
          value: sliceserve
        - name: HOME
          value: /cache
        - name: TORCHINDUCTOR_CACHE_DIR
          value: /cache/inductor
        - name: VLLM_CACHE_ROOT
          value: /cache/vllm
        - name: TRITON_CACHE_DIR
          value: /cache/triton
        - name: HF_HUB_OFFLINE
          value: "1"
        - name: VLLM_NO_USAGE_STATS
          value: "1"
        {{- if ne .role "alone" }}
        - name: RAY_USAGE_STATS_ENABLED
          value: "0"
        - name: VLLM_HOST_IP
          valueFrom:
            fieldRef:
              fieldPath: status.podIP
        {{- end }}
        {{- include "sliceserve.refuseSecrets" (dict "where" "server.extraEnv" "environment" $server.extraEnv) }}
        {{- with $server.extraEnv }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      {{- if ne .role "worker" }}
      ports:
        - name: http
          containerPort: {{ $server.port }}
      startupProbe:
        httpGet: {path: /readyz, port: http}
        periodSeconds: 10
        timeoutSeconds: 5
        failureThreshold: {{ mul $server.startupMinutes 6 }}
      readinessProbe:
        httpGet: {path: /readyz, port: http}
        periodSeconds: 2
        # Above --probe-timeout: a long step of the model is no reason to send nobody.
        timeoutSeconds: 15
        failureThreshold: 2
      livenessProbe:
        httpGet: {path: /livez, port: http}
        periodSeconds: 10
        timeoutSeconds: 15
        failureThreshold: 6
      {{- end }}
      lifecycle:
        preStop:
          # So that no request comes any more when the server is told to stop; a worker stays until
          # its leader has drained.
          exec:
            command: [sleep, {{ eq .role "worker" | ternary (add $server.preStopSeconds $server.drainTimeoutSeconds) $server.preStopSeconds | quote }}]
      resources:
        {{- include "sliceserve.resources" (dict "root" $root "resources" $server.resources "gpus" (include "sliceserve.gpus" $root | int)) | nindent 8 }}
      securityContext:
        {{- include "sliceserve.securityContext" $root | nindent 8 }}
      volumeMounts:
        - name: checkpoints
          mountPath: /checkpoints
          readOnly: true
        - name: cache
          mountPath: /cache
        - name: tmp
          mountPath: /tmp
        - name: shared-memory
          mountPath: /dev/shm
        {{- if and $root.Values.auth.existingSecret (ne .role "worker") }}
        - name: api-key
          mountPath: /etc/sliceserve/key
          readOnly: true
        {{- end }}
  volumes:
    - name: checkpoints
      persistentVolumeClaim:
        claimName: {{ include "sliceserve.claim" $root | quote }}
    - name: cache
      emptyDir:
        sizeLimit: {{ $server.cacheSize | quote }}
    - name: tmp
      emptyDir:
        # Ray keeps logs and spilled objects there.
        sizeLimit: {{ eq .role "alone" | ternary "1Gi" "10Gi" }}
    - name: shared-memory
      emptyDir:
        medium: Memory
        sizeLimit: {{ mul $server.sharedMemoryMiBPerRank (include "sliceserve.gpus" $root) }}Mi
    {{- if and $root.Values.auth.existingSecret (ne .role "worker") }}
    - name: api-key
      secret:
        secretName: {{ $root.Values.auth.existingSecret | quote }}
        defaultMode: 0440
    {{- end }}
{{- end -}}
