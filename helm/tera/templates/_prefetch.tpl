{{/* The repositories that the prefetch Job downloads, as JSON. */}}
{{- define "tera.prefetched" -}}
{{- $sources := list -}}
{{- if and .Values.modelCache.enabled .Values.modelCache.prefetch -}}
{{- range $name, $model := include "tera.deployed" . | fromJson -}}
{{- if hasPrefix "hf://" $model.source -}}
{{- $sources = append $sources (trimPrefix "hf://" $model.source) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- toJson (uniq $sources) -}}
{{- end }}

{{/* A Job never changes, so another one is another Job; what downloads the same keeps its name and runs
     once. */}}
{{- define "tera.prefetchName" -}}
{{ .Release.Name }}-prefetch-{{ include "tera.prefetchSpec" . | sha256sum | trunc 8 }}
{{- end }}

{{- define "tera.prefetchSpec" -}}
backoffLimit: 6
template:
  {{- include "tera.withPod" (dict "template" (include "tera.prefetchPod" .) "pod" .Values.modelCache.pod) | nindent 2 }}
{{- end }}

{{- define "tera.prefetchPod" -}}
metadata:
  labels:
    {{- include "tera.selector" . | nindent 4 }}
    app.kubernetes.io/component: prefetch
spec:
  restartPolicy: Never
  automountServiceAccountToken: false
  enableServiceLinks: false
  {{- include "tera.pullSecrets" . | indent 2 }}
  securityContext:
    {{- include "tera.podSecurity" . | nindent 4 }}
  containers:
    - name: prefetch
      image: {{ include "tera.image" . | quote }}
      imagePullPolicy: {{ .Values.image.pullPolicy }}
      securityContext:
        {{- include "tera.containerSecurity" . | nindent 8 }}
      command:
        - python
        - -c
        - |
          import sys
          from huggingface_hub import snapshot_download
          from tqdm import tqdm

          class Lines(tqdm):
              """Progress as a line every half minute: a log has no cursor to move."""

              def __init__(self, *args, **options):
                  super().__init__(*args, **{**options, "mininterval": 30})

              def display(self, msg=None, pos=None):
                  print(f"  {self}", flush=True)

          failed = []
          for source in sys.argv[1:]:
              name, _, revision = source.partition("@")
              print(f"{source}: downloading", flush=True)
              try:
                  snapshot_download(name, revision=revision or None, tqdm_class=Lines)
              except Exception as error:
                  failed.append(source)
                  print(f"{source}: {error}", flush=True)
              else:
                  print(f"{source}: complete", flush=True)
          if failed:
              sys.exit(f"not complete: {', '.join(failed)}")
        {{- range include "tera.prefetched" . | fromJsonArray }}
        - {{ quote . }}
        {{- end }}
      env:
        - {name: HOME, value: /tmp}
        - {name: HF_HOME, value: /models/huggingface}
        {{- include "tera.trustEnvironment" . | indent 8 }}
        {{- with .Values.huggingface }}
        {{- if .existingSecret }}
        - name: HF_TOKEN
          valueFrom: {secretKeyRef: {name: {{ .existingSecret }}, key: {{ .secretKey }}}}
        {{- end }}
        {{- end }}
      resources:
        requests: {cpu: 500m, memory: 1Gi}
        limits: {memory: 2Gi}
      volumeMounts:
        - {name: tmp, mountPath: /tmp}
        - {name: models, mountPath: /models}
        {{- include "tera.trustMount" . | indent 8 }}
  volumes:
    - {name: tmp, emptyDir: {}}
    - name: models
      persistentVolumeClaim: {claimName: {{ include "tera.claim" . }}}
    {{- include "tera.trustVolume" . | indent 4 }}
{{- end }}
