{{- define "tera.rayPodWithAdditions" -}}
{{- include "tera.withPod" (dict "template" (include "tera.rayPod" .) "pod" .additions) -}}
{{- end }}

{{/* The pod of a Ray process. Takes root, component, and for a worker: pool, or nothing for the
     group without GPUs. Nothing here may change with a release that changes no value: a pod template
     that differs makes a new cluster. */}}
{{- define "tera.rayPod" -}}
{{- $root := .root -}}
{{- $pool := .pool -}}
{{- $worker := ne .component "head" -}}
{{- /* The head has nothing to hand over, and until it is gone there is no other. */ -}}
{{- $grace := $worker | ternary 120 35 -}}
{{- $cache := and $root.Values.modelCache.enabled (or $pool (and $worker (eq $root.Values.modelCache.accessMode "ReadWriteMany"))) -}}
metadata:
  labels:
    {{- include "tera.selector" $root | nindent 4 }}
    app.kubernetes.io/component: {{ .component }}
    {{- if $pool }}
    tera/pool: {{ .name }}
    {{- end }}
  {{- if not $worker }}
  annotations:
    cluster-autoscaler.kubernetes.io/safe-to-evict: "false"
    karpenter.sh/do-not-disrupt: "true"
  {{- end }}
spec:
  {{- if $worker }}
  serviceAccountName: {{ include "tera.serviceAccount" (dict "root" $root "name" (empty $pool | ternary "gateway" (printf "pool-%v" .name)) "pod" .additions) }}
  automountServiceAccountToken: false
  {{- else }}
  {{- with (.additions.serviceAccount | default dict).name }}
  serviceAccountName: {{ . }}
  {{- end }}
  {{- end }}
  enableServiceLinks: false
  terminationGracePeriodSeconds: {{ $grace }}
  {{- include "tera.pullSecrets" $root | indent 2 }}
  securityContext:
    {{- include "tera.podSecurity" $root | nindent 4 }}
  {{- with .nodeSelector }}
  nodeSelector:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- if $pool }}
  {{- with $pool.tolerations }}
  tolerations:
    {{- range . }}
    - {{ include "tera.withoutEmpty" . }}
    {{- end }}
  {{- end }}
  {{- with $pool.runtimeClassName }}
  runtimeClassName: {{ . }}
  {{- end }}
  {{- else if $worker }}
  topologySpreadConstraints:
    - maxSkew: 1
      topologyKey: kubernetes.io/hostname
      whenUnsatisfiable: ScheduleAnyway
      labelSelector:
        matchLabels:
          {{- include "tera.selector" $root | nindent 10 }}
          app.kubernetes.io/component: {{ .component }}
    - maxSkew: 1
      topologyKey: topology.kubernetes.io/zone
      whenUnsatisfiable: ScheduleAnyway
      labelSelector:
        matchLabels:
          {{- include "tera.selector" $root | nindent 10 }}
          app.kubernetes.io/component: {{ .component }}
  {{- end }}
  containers:
    - name: {{ $worker | ternary "ray-worker" "ray-head" }}
      image: {{ include "tera.image" $root | quote }}
      imagePullPolicy: {{ $root.Values.image.pullPolicy }}
      securityContext:
        {{- include "tera.containerSecurity" $root | nindent 8 }}
      ports:
        {{- if $worker }}
        - {name: http, containerPort: 8000}
        {{- else }}
        - {name: gcs-server, containerPort: 6379}
        - {name: dashboard, containerPort: 8265}
        # Nothing answers there: without this name KubeRay makes no service for the API.
        - {name: serve, containerPort: 8000}
        {{- end }}
        - {name: metrics, containerPort: 8080}
      env:
        - {name: HOME, value: /state}
        - {name: TERA_HOME, value: /state}
        - {name: RAY_USAGE_STATS_ENABLED, value: "0"}
        # Ray would run replicas at niceness 15, behind every other process of the node.
        - {name: RAY_worker_niceness, value: "0"}
        # At SIGTERM Ray lets replicas finish for so long, and then ends them before the kubelet does.
        - {name: RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S, value: {{ sub $grace 10 | quote }}}
        - {name: RAY_SERVE_ENABLE_HA_PROXY, value: "1"}
        - {name: RAY_SERVE_THROUGHPUT_OPTIMIZED, value: "1"}
        - {name: RAY_SERVE_USE_GRPC_BY_DEFAULT, value: "1"}
        - {name: RAY_SERVE_HAPROXY_BINARY_PATH, value: /opt/tera/bin/tera-haproxy}
        - {name: RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S, value: "3600"}
        {{- if $worker }}
        - {name: TERA_MAX_CONNECTIONS, value: {{ int $root.Values.gateway.connections.max | quote }}}
        - {name: TERA_MAX_CONNECTIONS_PER_SOURCE, value: {{ int $root.Values.gateway.connections.perSource | quote }}}
        {{- include "tera.workerEnvironment" (dict "root" $root "cache" $cache "gateway" (not $pool)) | nindent 8 }}
        {{- include "tera.trustEnvironment" $root | indent 8 }}
        {{- end }}
      resources:
        {{- include "tera.resources" . | nindent 8 }}
      {{- if $worker }}
      # KubeRay's own would ask the proxy of every worker, and there is none where a later stage of a
      # pipeline runs. A gateway is asked what clients ask for: an answer through its proxy.
      readinessProbe:
        {{- if $pool }}
        httpGet: {path: /api/local_raylet_healthz, port: 52365}
        periodSeconds: 5
        {{- else }}
        httpGet: {path: /readyz, port: http}
        periodSeconds: 1
        {{- end }}
        timeoutSeconds: 5
      livenessProbe:
        httpGet: {path: /api/local_raylet_healthz, port: 52365}
        initialDelaySeconds: 30
        periodSeconds: 10
        timeoutSeconds: 5
        failureThreshold: 12
      {{- end }}
      volumeMounts:
        - {name: tmp, mountPath: /tmp}
        - {name: state, mountPath: /state}
        {{- if $pool }}
        - {name: shm, mountPath: /dev/shm}
        {{- end }}
        {{- if $cache }}
        - {name: models, mountPath: /models}
        {{- end }}
        {{- if and $worker (not $pool) }}
        - {name: keys, mountPath: /keys, readOnly: true}
        {{- end }}
        {{- if $worker }}
        {{- include "tera.trustMount" $root | indent 8 }}
        {{- end }}
  volumes:
    - {name: tmp, emptyDir: {}}
    - {name: state, emptyDir: {}}
    {{- if $pool }}
    - {name: shm, emptyDir: {medium: Memory, sizeLimit: {{ include "tera.quantity" $pool.shmSize | quote }}}}
    {{- end }}
    {{- if $cache }}
    - name: models
      persistentVolumeClaim: {claimName: {{ include "tera.claim" $root }}}
    {{- end }}
    {{- if and $worker (not $pool) }}
    - name: keys
      secret:
        secretName: {{ include "tera.keysSecret" $root }}
        items: [{key: keys.yaml, path: keys.yaml}]
    {{- end }}
    {{- if $worker }}
    {{- include "tera.trustVolume" $root | indent 4 }}
    {{- end }}
{{- end }}

{{/* Runs the autoscaler below a shell that passes SIGTERM on, and ends with its exit code. */}}
{{- define "tera.autoscalerScript" -}}
$KUBERAY_GEN_AUTOSCALER_START_CMD & autoscaler=$!; trap 'kill $autoscaler' TERM; wait $autoscaler
{{- end }}

{{- define "tera.claim" -}}
{{ .Values.modelCache.existingClaim | default (printf "%s-models" .Release.Name) }}
{{- end }}

{{- define "tera.resources" -}}
{{- $resources := dict "cpu" .resources.cpu "memory" .resources.memory -}}
{{- if .pool -}}
{{- $_ := set $resources .pool.gpuResource (int .pool.gpusPerWorker | toString) -}}
{{- end -}}
{{- range $name, $quantity := $resources -}}
{{- $_ := set $resources $name (include "tera.quantity" $quantity) -}}
{{- end -}}
requests:
  {{- toYaml $resources | nindent 2 }}
limits:
  {{- toYaml $resources | nindent 2 }}
{{- end }}

{{/* A map without entries that are null or "", as JSON: KubeRay drops those when it writes it back. */}}
{{- define "tera.withoutEmpty" -}}
{{- $kept := dict -}}
{{- range $key, $value := . -}}
{{- if not (or (kindIs "invalid" $value) (eq (toString $value) "")) -}}
{{- $_ := set $kept $key $value -}}
{{- end -}}
{{- end -}}
{{- toJson $kept -}}
{{- end }}

{{/* The variables that `tera.config.environment.Runtime` reads, and where the weights are. */}}
{{- define "tera.workerEnvironment" -}}
{{- $values := .root.Values -}}
{{- $secret := include "tera.keysSecret" .root -}}
- name: TERA_CLUSTER_SECRET
  valueFrom: {secretKeyRef: {name: {{ $secret }}, key: cluster-secret}}
{{- if .gateway }}
- name: TERA_KEY_PEPPER
  valueFrom: {secretKeyRef: {name: {{ $secret }}, key: key-pepper}}
- {name: TERA_KEYS_FILE, value: /keys/keys.yaml}
{{- if $values.redis.embedded }}
- name: TERA_REDIS_PASSWORD
  valueFrom: {secretKeyRef: {name: {{ .root.Release.Name }}-redis, key: password}}
- {name: TERA_REDIS_URL, value: "redis://:$(TERA_REDIS_PASSWORD)@{{ .root.Release.Name }}-redis:6379/0"}
{{- else }}
{{- $external := $values.redis.external }}
{{- $scheme := $external.tls | ternary "rediss" "redis" }}
{{- if $external.existingSecret }}
- name: TERA_REDIS_PASSWORD
  valueFrom: {secretKeyRef: {name: {{ $external.existingSecret }}, key: {{ $external.secretKey }}}}
- {name: TERA_REDIS_URL, value: "{{ $scheme }}://:$(TERA_REDIS_PASSWORD)@{{ $external.address }}/0"}
{{- else }}
- {name: TERA_REDIS_URL, value: "{{ $scheme }}://{{ $external.address }}/0"}
{{- end }}
{{- end }}
{{- end }}
{{- if .cache }}
- {name: HF_HOME, value: /models/huggingface}
- {name: VLLM_CACHE_ROOT, value: /models/vllm}
{{- end }}
{{- with $values.huggingface }}
{{- if .existingSecret }}
- name: HF_TOKEN
  valueFrom: {secretKeyRef: {name: {{ .existingSecret }}, key: {{ .secretKey }}}}
{{- end }}
{{- if .offline }}
- {name: HF_HUB_OFFLINE, value: "1"}
{{- end }}
{{- end }}
{{- with $values.objectStore.existingSecret }}
{{- $store := . }}
{{- range list "AWS_ACCESS_KEY_ID" "AWS_SECRET_ACCESS_KEY" "AWS_SESSION_TOKEN" "AWS_REGION" "AWS_ENDPOINT_URL" "RUNAI_STREAMER_S3_USE_VIRTUAL_ADDRESSING" }}
- name: {{ . }}
  valueFrom: {secretKeyRef: {name: {{ $store }}, key: {{ . }}, optional: true}}
{{- end }}
{{- end }}
{{- end }}
