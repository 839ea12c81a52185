{{/* Ray Serve's configuration: the same as `tera.manifest.cluster_serve_config` returns. As JSON, since
     Helm's numbers keep their form there (10485760 would become 1.048576e+07 in YAML). */}}
{{- define "tera.serveConfig" -}}
{{- $models := include "tera.deployed" . | fromJson -}}
{{- $drain := .Values.gateway.requests.drainSeconds -}}
{{- $applications := list -}}
{{- range $name, $model := $models -}}
{{- $autoscaling := include "tera.autoscaling" (list $model.replicas $model.scaling) | fromJson -}}
{{- $_ := set $autoscaling "policy" (dict "policy_function" "tera.autoscaling.policy:idle_replicas_first") -}}
{{- $deployment := dict
      "name" "Engine"
      "autoscaling_config" $autoscaling
      "max_ongoing_requests" (int $model.scaling.maxOngoingRequests)
      "user_config" (dict "drainSeconds" $drain) -}}
{{- $deployment = merge $deployment (include "tera.placement" $model | fromJson) (include "tera.lifecycle" $drain | fromJson) -}}
{{- $applications = append $applications (dict
      "name" (printf "model-%s" $name)
      "import_path" "tera.deploy:build_model"
      "route_prefix" nil
      "args" (pick $model "source" "engine" "parallelism" "gpuSharing")
      "deployments" (list $deployment)) -}}
{{- end -}}
{{- $scaling := dict "targetOngoingRequests" 200 "upscaleDelaySeconds" 10 "downscaleDelaySeconds" 300 "downscaleToZeroDelaySeconds" 1800 -}}
{{- $gateway := pick .Values.gateway "usage" "cors" "openapi" "requests" -}}
{{- $_ := set $gateway "limits" (include "tera.limits" .Values.gateway.limits | fromJson) -}}
{{- $deployment := dict
      "name" "Gateway"
      "autoscaling_config" (include "tera.autoscaling" (list .Values.gateway.replicas $scaling) | fromJson)
      "max_ongoing_requests" 10000
      "max_replicas_per_node" 1
      "user_config" (dict "models" $models "gateway" $gateway) -}}
{{- $deployment = merge $deployment (include "tera.placement" (dict "pool" "") | fromJson) (include "tera.lifecycle" $drain | fromJson) -}}
{{- $applications = append $applications (dict
      "name" "gateway"
      "import_path" "tera.deploy:build_gateway"
      "route_prefix" "/"
      "args" dict
      "deployments" (list $deployment)) -}}
{{- toPrettyJson (dict
      "proxy_location" "EveryNode"
      "http_options" (dict "host" "0.0.0.0" "port" 8000)
      "logging_config" (dict "enable_access_log" false)
      "applications" $applications) -}}
{{- end }}

{{- define "tera.autoscaling" -}}
{{- $replicas := first . -}}
{{- $scaling := last . -}}
{{- toJson (dict
      "min_replicas" (int $replicas.min)
      "max_replicas" (int $replicas.max)
      "target_ongoing_requests" $scaling.targetOngoingRequests
      "upscale_delay_s" $scaling.upscaleDelaySeconds
      "downscale_delay_s" $scaling.downscaleDelaySeconds
      "downscale_to_zero_delay_s" $scaling.downscaleToZeroDelaySeconds
      "metrics_interval_s" 1.0
      "look_back_period_s" 2.0) -}}
{{- end }}

{{/* Where a model's replicas are placed; the gateway's are placed like those of a model without a pool. */}}
{{- define "tera.placement" -}}
{{- $share := dict (printf "pool_%s" (.pool | default "cpu")) 0.001 -}}
{{- if not .pool -}}
{{- toJson (dict "ray_actor_options" (dict "num_cpus" 1 "resources" $share)) -}}
{{- else -}}
{{- $gpus := mul (int .parallelism.tensor) (int .parallelism.pipeline) | int -}}
{{- if eq $gpus 1 -}}
{{- toJson (dict "ray_actor_options" (dict "num_cpus" 1 "num_gpus" (divf (div 10000 (int .gpuSharing.replicasPerGpu)) 10000) "resources" $share)) -}}
{{- else -}}
{{- $bundle := merge (dict "GPU" 1) $share -}}
{{- $bundles := list (merge (dict "CPU" 1) $bundle) -}}
{{- range untilStep 1 $gpus 1 -}}
{{- $bundles = append $bundles $bundle -}}
{{- end -}}
{{- toJson (dict
      "ray_actor_options" (dict "num_cpus" 1)
      "placement_group_bundles" $bundles
      "placement_group_strategy" (eq (int .parallelism.pipeline) 1 | ternary "STRICT_PACK" "PACK")) -}}
{{- end -}}
{{- end -}}
{{- end }}

{{- define "tera.lifecycle" -}}
{{- toJson (dict "health_check_period_s" 2 "health_check_timeout_s" 10 "graceful_shutdown_timeout_s" .) -}}
{{- end }}

{{/* Limits with the entries that Python adds, and without those that are null. */}}
{{- define "tera.limits" -}}
{{- $tenants := dict -}}
{{- range $name, $limits := .tenants -}}
{{- $_ := set $tenants $name (include "tera.tenantLimits" $limits | fromJson) -}}
{{- end -}}
{{- toJson (dict
      "default" (include "tera.tenantLimits" (.default | default dict) | fromJson)
      "tenants" $tenants
      "onRedisError" .onRedisError
      "staleKeysSeconds" .staleKeysSeconds) -}}
{{- end }}

{{- define "tera.tenantLimits" -}}
{{- $models := dict -}}
{{- range $name, $limits := .models -}}
{{- $_ := set $models $name (include "tera.withoutNull" $limits | fromJson) -}}
{{- end -}}
{{- $limits := include "tera.withoutNull" (omit . "models") | fromJson -}}
{{- toJson (set $limits "models" $models) -}}
{{- end }}

{{- define "tera.withoutNull" -}}
{{- $kept := dict -}}
{{- range $key, $value := . -}}
{{- if not (kindIs "invalid" $value) -}}
{{- $_ := set $kept $key $value -}}
{{- end -}}
{{- end -}}
{{- toJson $kept -}}
{{- end }}
