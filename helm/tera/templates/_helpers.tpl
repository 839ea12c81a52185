{{/* The labels that never change: selectors and pod templates have these and no others, since
     another label there would make a new cluster. No app.kubernetes.io/name: KubeRay's head service
     finds the head by its own. */}}
{{- define "tera.selector" -}}
app.kubernetes.io/part-of: tera
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "tera.labels" -}}
{{ include "tera.selector" . }}
app.kubernetes.io/name: tera
app.kubernetes.io/managed-by: {{ .Release.Service }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}

{{- define "tera.image" -}}
{{- $image := .Values.image -}}
{{- $repository := include "tera.mirrored" (list . $image.repository) -}}
{{- if $image.digest -}}
{{ $repository }}@{{ $image.digest }}
{{- else -}}
{{ $repository }}:{{ $image.tag | default .Chart.AppVersion }}
{{- end -}}
{{- end }}

{{/* An image with `global.imageRegistry` in place of its own registry, which is what is before the
     first slash and is no name but an address. */}}
{{- define "tera.mirrored" -}}
{{- $registry := (first .).Values.global.imageRegistry -}}
{{- $image := last . -}}
{{- if $registry -}}
{{ trimSuffix "/" $registry }}/{{ regexReplaceAll "^([^/]*[.:][^/]*|localhost)/" $image "" }}
{{- else -}}
{{ $image }}
{{- end -}}
{{- end }}

{{- define "tera.gatewayService" -}}
{{ .Release.Name }}-gateway
{{- end }}

{{/* Not empty if the state of Ray's head is kept in a Valkey of the chart's own. */}}
{{- define "tera.ownGcs" -}}
{{- with .Values.gcsFaultTolerance }}{{ and .enabled (not .address) | ternary "yes" "" }}{{ end -}}
{{- end }}

{{- define "tera.keysSecret" -}}
{{ .Values.gateway.auth.existingSecret | default (printf "%s-keys" .Release.Name) }}
{{- end }}

{{/* The paths that are reachable from outside: the API, without the operators' routes. The same as
     `tera.gateway.routes.public_paths`. */}}
{{- define "tera.publicPaths" -}}
{{- toJson (dict "/v1" "Prefix" "/openapi.json" "Exact") -}}
{{- end }}

{{/* One map over another, key by key; anything but a map is replaced whole, also by `false` or 0. */}}
{{- define "tera.merged" -}}
{{- $merged := deepCopy (first .) -}}
{{- range $key, $value := last . -}}
{{- $below := index $merged $key -}}
{{- if and (kindIs "map" $value) (kindIs "map" $below) -}}
{{- $value = include "tera.merged" (list $below $value) | fromJson -}}
{{- end -}}
{{- $_ := set $merged $key $value -}}
{{- end -}}
{{- toJson $merged -}}
{{- end }}

{{/* Every model with its inherited settings, as JSON. */}}
{{- define "tera.models" -}}
{{- $none := dict "aliases" list "source" "" "pool" "" "capabilities" (list "completions" "chat") "engine" (dict "kind" "vllm" "args" dict) -}}
{{- $defaults := include "tera.merged" (list $none .Values.modelDefaults) | fromJson -}}
{{- $models := dict -}}
{{- range $name, $model := .Values.models -}}
{{- $_ := set $models $name (include "tera.merged" (list $defaults $model) | fromJson) -}}
{{- end -}}
{{- toJson $models -}}
{{- end }}

{{/* The models that are deployed, as JSON. */}}
{{- define "tera.deployed" -}}
{{- $deployed := dict -}}
{{- range $name, $model := include "tera.models" . | fromJson -}}
{{- if and $model.enabled (gt (int $model.replicas.max) 0) -}}
{{- $_ := set $deployed $name $model -}}
{{- end -}}
{{- end -}}
{{- toJson $deployed -}}
{{- end }}

{{/* Seconds that the slowest model may take to start. */}}
{{- define "tera.longestColdStart" -}}
{{- $longest := 0.0 -}}
{{- range include "tera.deployed" . | fromJson -}}
{{- $longest = maxf $longest .scaling.coldStartDeadlineSeconds -}}
{{- end -}}
{{- $longest -}}
{{- end }}

{{/* Every pool with its inherited settings, as JSON. */}}
{{- define "tera.pools" -}}
{{- $none := dict "joins" "" "priority" 0 -}}
{{- $defaults := include "tera.merged" (list $none .Values.poolDefaults) | fromJson -}}
{{- $pools := dict -}}
{{- range $name, $pool := .Values.gpuPools -}}
{{- $_ := set $pools $name (include "tera.merged" (list $defaults $pool) | fromJson) -}}
{{- end -}}
{{- toJson $pools -}}
{{- end }}

{{/* The pools that a budget is of, by the name of the one that the others join, as JSON. Counted are
     the workers that its models need at their smallest numbers of replicas. */}}
{{- define "tera.budgets" -}}
{{- $budgets := dict -}}
{{- $deployed := include "tera.deployed" . | fromJson -}}
{{- $pools := include "tera.pools" . | fromJson -}}
{{- range $name, $pool := $pools -}}
  {{- if not $pool.joins -}}
    {{- $alike := list $name -}}
    {{- $largest := int $pool.gpusPerWorker -}}
    {{- range $other, $each := $pools -}}
      {{- if eq $each.joins $name -}}
        {{- $alike = append $alike $other -}}
        {{- $largest = max $largest (int $each.gpusPerWorker) -}}
      {{- end -}}
    {{- end -}}
    {{- $gpus := 0.0 -}}
    {{- range $deployed -}}
      {{- if eq .pool $name -}}
        {{- $gpus = addf $gpus (divf (mul (int .replicas.min) (int .parallelism.tensor) (int .parallelism.pipeline)) (int .gpuSharing.replicasPerGpu)) -}}
      {{- end -}}
    {{- end -}}
    {{- if gt $gpus (mulf $largest (int $.Values.pdb.minAvailable)) -}}
      {{- $_ := set $budgets $name $alike -}}
    {{- end -}}
  {{- end -}}
{{- end -}}
{{- toJson $budgets -}}
{{- end }}

{{- define "tera.podSecurity" -}}
runAsNonRoot: true
runAsUser: 1000
runAsGroup: 1000
fsGroup: 1000
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "tera.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}

{{- define "tera.pullSecrets" -}}
{{- with concat .Values.imagePullSecrets .Values.global.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}
