{{/* The rules that the schema cannot express. Each message begins with the path of the value and has
     the words of `tera config check`. */}}
{{- define "tera.validate" -}}
{{- $faults := list -}}
{{- if not (regexMatch "^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$" .Release.Name) -}}
{{- $faults = append $faults (printf "release name: %q must be a DNS label of 40 characters at most that begins with a letter" .Release.Name) -}}
{{- end -}}
{{- $values := .Values -}}
{{- $pools := include "tera.pools" . | fromJson -}}
{{- $models := include "tera.models" . | fromJson -}}

{{- $named := list -}}
{{- $holding := dict -}}
{{- range $name, $pool := $pools -}}
  {{- if not $pool.joins -}}
    {{- $named = append $named $name -}}
  {{- end -}}
  {{- range $each := list $name $pool.joins | uniq | compact -}}
    {{- $_ := set $holding $each (append (get $holding $each | default list) $name) -}}
  {{- end -}}
{{- end -}}
{{- $there := sortAlpha $named | join ", " | default "none" -}}

{{- $owner := dict -}}
{{- $gpus := dict -}}
{{- range $name, $model := $models -}}
  {{- range $client := prepend $model.aliases $model.id -}}
    {{- if hasKey $owner $client -}}
      {{- $faults = append $faults (printf "models.%s: models.%s answers to '%s' too; give each model its own id and aliases" $name (get $owner $client) $client) -}}
    {{- end -}}
    {{- $_ := set $owner $client $name -}}
  {{- end -}}
  {{- $faults = concat $faults (include "tera.boundsFault" (list (printf "models.%s.replicas" $name) $model.replicas) | fromJsonArray) -}}
  {{- if and (eq $model.engine.kind "vllm") (not $model.source) -}}
    {{- $faults = append $faults (printf "models.%s: source is missing; a vllm model needs one, such as hf://org/name" $name) -}}
  {{- else if hasPrefix "pvc://" $model.source -}}
    {{- $faults = append $faults (printf "models.%s: source '%s' is not supported; mount the claim with modelCache.existingClaim and write file:///models/PATH" $name $model.source) -}}
  {{- else if hasPrefix "oci://" $model.source -}}
    {{- $faults = append $faults (printf "models.%s: source '%s' is not supported; build the model into the image, or copy it to a volume, and write file:///PATH" $name $model.source) -}}
  {{- else if and $model.source (not (regexMatch "^(hf|s3|gs|file|demo)://.+" $model.source)) -}}
    {{- $faults = append $faults (printf "models.%s: source '%s' must begin with one of hf://, s3://, gs://, file://, demo://" $name $model.source) -}}
  {{- else if and (hasPrefix "file://" $model.source) (not (hasPrefix "file:///" $model.source)) -}}
    {{- $faults = append $faults (printf "models.%s: source '%s' is not an absolute path; write file:///models/PATH" $name $model.source) -}}
  {{- else if and (hasPrefix "hf://" $model.source) (not (regexMatch "^hf://[\\w.-]+(/[\\w.-]+)?(@.*)?$" $model.source)) -}}
    {{- $faults = append $faults (printf "models.%s: source '%s' does not name a repository; write hf://org/name" $name $model.source) -}}
  {{- end -}}
  {{- if eq $model.engine.kind "vllm" -}}
    {{- range $argument, $instead := dict "model" "set source instead" "tensor_parallel_size" "set parallelism.tensor instead" "pipeline_parallel_size" "set parallelism.pipeline instead" "enable_sleep_mode" "set gpuSharing.replicasPerGpu instead" "worker_extension_cls" "Tera uses its own extension there" -}}
      {{- if hasKey $model.engine.args $argument -}}
        {{- $faults = append $faults (printf "models.%s.engine.args.%s: %s" $name $argument $instead) -}}
      {{- end -}}
    {{- end -}}
  {{- end -}}
  {{- $ranks := mul (int $model.parallelism.tensor) (int $model.parallelism.pipeline) -}}
  {{- if and (gt (int $model.gpuSharing.replicasPerGpu) 1) (gt $ranks 1) -}}
    {{- $faults = append $faults (printf "models.%s: gpuSharing.replicasPerGpu: a replica on %d GPUs cannot share them; set it to 1, or parallelism.tensor and .pipeline" $name $ranks) -}}
  {{- end -}}
  {{- $deployed := and $model.enabled (gt (int $model.replicas.max) 0) -}}
  {{- if and $deployed (hasPrefix "demo://" $model.source) -}}
    {{- $faults = append $faults (printf "models.%s.source: demo:// is for one machine" $name) -}}
  {{- end -}}
  {{- if not $model.pool -}}
    {{- if and $deployed (eq $model.engine.kind "vllm") -}}
      {{- $faults = append $faults (printf "models.%s.pool: is missing; on a cluster a vllm model needs one" $name) -}}
    {{- end -}}
  {{- else if not (hasKey $pools $model.pool) -}}
    {{- $faults = append $faults (printf "models.%s.pool: there is no pool '%s'; the pools are: %s" $name $model.pool $there) -}}
  {{- else if (get $pools $model.pool).joins -}}
    {{- $faults = append $faults (printf "models.%s.pool: '%s' joins the pool '%s'; name that one, and both run the model" $name $model.pool (get $pools $model.pool).joins) -}}
  {{- else -}}
    {{- range $each := get $holding $model.pool -}}
      {{- $gpusPerWorker := int (get $pools $each).gpusPerWorker -}}
      {{- if gt (int $model.parallelism.tensor) $gpusPerWorker -}}
        {{- $faults = append $faults (printf "models.%s.parallelism.tensor: %d exceeds the %d GPU(s) of a worker; lower it, or raise gpuPools.%s.gpusPerWorker" $name (int $model.parallelism.tensor) $gpusPerWorker $each) -}}
      {{- end -}}
    {{- end -}}
    {{- if $model.enabled -}}
      {{- /* In units of 1/840, which 1 to 8 replicas divide without a remainder. */ -}}
      {{- $wanted := div (mul (int $model.replicas.max) $ranks 840) (int $model.gpuSharing.replicasPerGpu) -}}
      {{- $_ := set $gpus $model.pool (add (get $gpus $model.pool | default 0) $wanted) -}}
    {{- end -}}
  {{- end -}}
{{- end -}}

{{- $orders := dict -}}
{{- $last := 0 -}}
{{- $workers := 0 -}}
{{- range $name, $pool := $pools -}}
  {{- $last = max $last (int $pool.order) -}}
  {{- $workers = add $workers (int $pool.maxWorkers) -}}
{{- end -}}
{{- range $name, $pool := $pools -}}
  {{- if eq $name "cpu" -}}
    {{- $faults = append $faults "gpuPools.cpu: is the group of the CPU pods; give the pool another name" -}}
  {{- end -}}
  {{- $order := printf "%d" (int $pool.order) -}}
  {{- if hasKey $orders $order -}}
    {{- $faults = append $faults (printf "gpuPools.%s.order: %s is taken by gpuPools.%s; %d is free" $name $order (get $orders $order) (add1 $last)) -}}
  {{- end -}}
  {{- $_ := set $orders $order $name -}}
  {{- if $pool.joins -}}
    {{- if not (hasKey $pools $pool.joins) -}}
      {{- $faults = append $faults (printf "gpuPools.%s.joins: there is no pool '%s'; the pools are: %s" $name $pool.joins $there) -}}
    {{- else if (get $pools $pool.joins).joins -}}
      {{- $faults = append $faults (printf "gpuPools.%s.joins: the pool '%s' joins '%s'; name one that joins none" $name $pool.joins (get $pools $pool.joins).joins) -}}
    {{- end -}}
  {{- end -}}
  {{- $memory := $pool.resources.memory -}}
  {{- if gt (include "tera.amount" $pool.shmSize | float64) (include "tera.amount" $memory | float64) -}}
    {{- $faults = append $faults (printf "gpuPools.%s.shmSize: %s exceeds resources.memory (%s), of which it is a part; lower it, or raise resources.memory" $name (include "tera.quantity" $pool.shmSize) (include "tera.quantity" $memory)) -}}
  {{- end -}}
  {{- if lt (include "tera.amount" $pool.resources.cpu | float64) (float64 $pool.gpusPerWorker) -}}
    {{- $faults = append $faults (printf "gpuPools.%s.resources.cpu: %s is less than one for each of %d GPUs; raise it, or lower gpusPerWorker" $name (include "tera.quantity" $pool.resources.cpu) (int $pool.gpusPerWorker)) -}}
  {{- end -}}
  {{- $wanted := div (add (get $gpus $name | default 0) 839) 840 -}}
  {{- $there := 0 -}}
  {{- range $each := get $holding $name -}}
    {{- $there = add $there (mul (int (get $pools $each).maxWorkers) (int (get $pools $each).gpusPerWorker)) -}}
  {{- end -}}
  {{- if gt (int $wanted) (int $there) -}}
    {{- $faults = append $faults (printf "gpuPools.%s.maxWorkers: its models may need %d GPUs but its workers have %d; raise maxWorkers, or lower a replicas.max" $name (int $wanted) (int $there)) -}}
  {{- end -}}
{{- end -}}

{{- $known := keys $models | sortAlpha -}}
{{- $limits := dict "default" ($values.gateway.limits.default | default dict) -}}
{{- range $tenant, $each := $values.gateway.limits.tenants -}}
  {{- $_ := set $limits (printf "tenants.%s" $tenant) $each -}}
{{- end -}}
{{- range $path, $each := $limits -}}
  {{- range $name, $_ := $each.models -}}
    {{- if not (hasKey $models $name) -}}
      {{- $faults = append $faults (printf "gateway.limits.%s.models.%s: there is no model '%s'; the models are: %s" $path $name $name (join ", " $known | default "none")) -}}
    {{- end -}}
  {{- end -}}
{{- end -}}
{{- $places := dict "head.pod" $values.head.pod "gateway.pod" $values.gateway.pod "redis.pod" $values.redis.pod "modelCache.pod" $values.modelCache.pod -}}
{{- range $name, $pool := $pools -}}
  {{- $_ := set $places (printf "gpuPools.%s.pod" $name) $pool.pod -}}
{{- end -}}
{{- range $path, $pod := $places -}}
  {{- range $label, $_ := $pod.labels -}}
    {{- if regexMatch "^(app\\.kubernetes\\.io|ray\\.io|tera)/" $label -}}
      {{- $faults = append $faults (printf "%s: labels %s is set by the chart or KubeRay; take another" $path $label) -}}
    {{- end -}}
  {{- end -}}
  {{- range $variable := list "RAY_REDIS_ADDRESS" "REDIS_PASSWORD" "REDIS_USERNAME" -}}
    {{- if hasKey ($pod.env | default dict) $variable -}}
      {{- $faults = append $faults (printf "%s: env %s is set by KubeRay; see gcsFaultTolerance" $path $variable) -}}
    {{- end -}}
  {{- end -}}
  {{- $account := $pod.serviceAccount | default dict -}}
  {{- if and $account.name $account.annotations -}}
    {{- $faults = append $faults (printf "%s.serviceAccount: annotations are for the chart's own account; annotate yours, or name none" $path) -}}
  {{- else if and $account.annotations (eq $path "head.pod") -}}
    {{- $faults = append $faults "head.pod: serviceAccount.annotations: KubeRay makes the head's account; name one of your own" -}}
  {{- end -}}
{{- end -}}

{{- $head := $values.head.resources.memory -}}
{{- if lt (include "tera.amount" $head | float64) (include "tera.amount" "4Gi" | float64) -}}
  {{- $faults = append $faults (printf "head.resources: memory %s is too little for Ray's own processes; give 4Gi or more" (include "tera.quantity" $head)) -}}
{{- end -}}

{{- $faults = concat $faults (include "tera.boundsFault" (list "gateway.replicas" $values.gateway.replicas) | fromJsonArray) -}}
{{- if eq $values.image.tag "latest" -}}
  {{- $faults = append $faults "image: tag \"latest\" can change under a running cluster; give a version" -}}
{{- end -}}
{{- if and $values.redis.embedded $values.redis.external.address -}}
  {{- $faults = append $faults "redis: external.address is set; set embedded: false to use it" -}}
{{- end -}}
{{- if not (or $values.redis.embedded $values.redis.external.address) -}}
  {{- $faults = append $faults "redis: external.address is missing; give host:port, or set embedded: true" -}}
{{- end -}}
{{- if and $values.gcsFaultTolerance.existingSecret (not $values.gcsFaultTolerance.address) -}}
  {{- $faults = append $faults "gcsFaultTolerance: existingSecret is that of another Redis; give its address, or leave both out" -}}
{{- end -}}
{{- if and $values.ingress.enabled (not $values.ingress.host) -}}
  {{- $faults = append $faults "ingress: host is missing; give the host name that clients use" -}}
{{- end -}}
{{- if and $values.httpRoute.enabled (not $values.httpRoute.parentRefs) -}}
  {{- $faults = append $faults "httpRoute: parentRefs is empty; name the Gateway that the route attaches to" -}}
{{- end -}}
{{- if and $values.modelCache.enabled (eq $values.modelCache.accessMode "ReadWriteOnce") (gt (int $workers) 1) -}}
  {{- $faults = append $faults (printf "modelCache.accessMode: ReadWriteOnce is for one worker and the pools may have %d; use ReadWriteMany" (int $workers)) -}}
{{- else if and $values.modelCache.enabled (eq $values.modelCache.accessMode "ReadWriteOnce") (eq $values.upgrade.strategy "NewCluster") -}}
  {{- $faults = append $faults "modelCache.accessMode: ReadWriteOnce is for one worker and a new cluster starts a second one; use ReadWriteMany, or set upgrade.strategy: None" -}}
{{- end -}}
{{- if and $values.huggingface.offline (not (and $values.modelCache.enabled (eq $values.modelCache.accessMode "ReadWriteMany"))) -}}
  {{- $faults = append $faults "huggingface.offline: gateways and workers then read only the model cache; set modelCache.enabled: true, with accessMode: ReadWriteMany" -}}
{{- end -}}
{{- with $values.observability -}}
{{- if or .dashboards .tracing.otlpEndpoint -}}
  {{- $faults = append $faults "observability: dashboards and tracing are not implemented yet; leave them out" -}}
{{- else if and .rules (not .podMonitor) -}}
  {{- $faults = append $faults "observability: rules need metrics that are not scraped; set podMonitor: true" -}}
{{- end -}}
{{- end -}}
{{- if $faults -}}
{{- fail (printf "\n%s" (join "\n" $faults)) -}}
{{- end -}}
{{- end }}

{{/* A list with one fault or none, as JSON, given a path and the bounds at it. */}}
{{- define "tera.boundsFault" -}}
{{- $low := int (last .).min -}}
{{- $high := int (last .).max -}}
{{- if and $high (gt $low $high) -}}
{{- toJson (list (printf "%s: min (%d) is greater than max (%d); lower min or raise max" (first .) $low $high)) -}}
{{- else -}}
[]
{{- end -}}
{{- end }}
