{{/* A Valkey of one pod with a volume. There are two: `redis`, with keys, limits and the ledger, and
     `gcs`, with the state of Ray's head. Each takes root, component, maxmemory, memory and storage. */}}
{{- define "tera.valkeyName" -}}
{{ .root.Release.Name }}-{{ .component }}
{{- end }}

{{- define "tera.valkeyLabels" -}}
{{ include "tera.selector" .root }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{- define "tera.valkeySecret" -}}
{{- $name := include "tera.valkeyName" . }}
{{- $old := (lookup "v1" "Secret" .root.Release.Namespace $name).data | default dict }}
{{- $password := get $old "password" | default (randAlphaNum 32 | b64enc) | b64dec }}
apiVersion: v1
kind: Secret
metadata:
  name: {{ $name }}
  labels:
    {{- include "tera.labels" .root | nindent 4 }}
type: Opaque
data:
  password: {{ b64enc $password }}
  # Whole, so that the password is on no command line. Full, it refuses writes and evicts nothing: a
  # limit that was evicted would be none, and Ray cannot read a state with gaps.
  valkey.conf: {{ printf "dir /data\nappendonly yes\nmaxmemory %s\nmaxmemory-policy noeviction\nrequirepass %s\n" .maxmemory $password | b64enc }}
{{- end }}

{{- define "tera.valkeyService" -}}
apiVersion: v1
kind: Service
metadata:
  name: {{ include "tera.valkeyName" . }}
  labels:
    {{- include "tera.labels" .root | nindent 4 }}
spec:
  selector:
    {{- include "tera.valkeyLabels" . | nindent 4 }}
  ports:
    - {name: redis, port: 6379, targetPort: redis}
{{- end }}

{{- define "tera.valkeyPod" -}}
metadata:
  labels:
    {{- include "tera.valkeyLabels" . | nindent 4 }}
spec:
  automountServiceAccountToken: false
  enableServiceLinks: false
  {{- include "tera.pullSecrets" .root | indent 2 }}
  securityContext:
    {{- include "tera.podSecurity" .root | nindent 4 }}
  containers:
    - name: valkey
      image: {{ include "tera.mirrored" (list .root .root.Values.redis.image) | quote }}
      command: [valkey-server, /conf/valkey.conf]
      securityContext:
        {{- include "tera.containerSecurity" .root | nindent 8 }}
      ports:
        - {name: redis, containerPort: 6379}
      readinessProbe:
        tcpSocket: {port: redis}
        periodSeconds: 5
      livenessProbe:
        tcpSocket: {port: redis}
        initialDelaySeconds: 30
        periodSeconds: 10
      resources:
        requests: {cpu: 100m, memory: {{ .memory }}}
        limits: {memory: {{ .memory }}}
      volumeMounts:
        - {name: data, mountPath: /data}
        - {name: conf, mountPath: /conf, readOnly: true}
  volumes:
    - name: conf
      secret:
        secretName: {{ include "tera.valkeyName" . }}
        items: [{key: valkey.conf, path: valkey.conf}]
{{- end }}

{{- define "tera.valkeySet" -}}
apiVersion: apps/v1
kind: StatefulSet
metadata:
  name: {{ include "tera.valkeyName" . }}
  labels:
    {{- include "tera.labels" .root | nindent 4 }}
spec:
  serviceName: {{ include "tera.valkeyName" . }}
  replicas: 1
  selector:
    matchLabels:
      {{- include "tera.valkeyLabels" . | nindent 6 }}
  template:
    {{- include "tera.withPod" (dict "template" (include "tera.valkeyPod" .) "pod" .root.Values.redis.pod) | nindent 4 }}
  volumeClaimTemplates:
    - metadata: {name: data}
      spec:
        accessModes: [ReadWriteOnce]
        resources:
          requests: {storage: {{ include "tera.quantity" .storage | quote }}}
{{- end }}
