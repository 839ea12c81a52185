{{/* A pod template with what the operator adds to it. Takes template, as YAML, whose first container
     is the main one, and pod: a `PodConfig` of `tera.config.pods`, of which only some keys may be
     there. */}}
{{- define "tera.withPod" -}}
{{- $template := fromYaml .template -}}
{{- $pod := .pod -}}
{{- $spec := $template.spec -}}
{{- $main := first $spec.containers -}}
{{- $_ := set $template.metadata "labels" (merge $template.metadata.labels ($pod.labels | default dict)) -}}
{{- with $pod.annotations -}}
{{- $_ := set $template.metadata "annotations" (mergeOverwrite ($template.metadata.annotations | default dict) .) -}}
{{- end -}}
{{- if $pod.env -}}
{{- $env := list -}}
{{- range $main.env -}}
{{- if not (hasKey $pod.env .name) -}}
{{- $env = append $env . -}}
{{- end -}}
{{- end -}}
{{- range $name, $value := $pod.env -}}
{{- $variable := dict "name" $name -}}
{{- if kindIs "map" $value -}}
{{- $_ := set $variable "valueFrom" (dict "secretKeyRef" (dict "name" $value.secretName "key" $value.secretKey)) -}}
{{- else if $value -}}
{{- $_ := set $variable "value" $value -}}
{{- end -}}
{{- $env = append $env $variable -}}
{{- end -}}
{{- $_ := set $main "env" $env -}}
{{- end -}}
{{- with $pod.priorityClassName -}}
{{- $_ := set $spec "priorityClassName" . -}}
{{- end -}}
{{- with $pod.nodeSelector -}}
{{- $_ := set $spec "nodeSelector" (mergeOverwrite ($spec.nodeSelector | default dict) .) -}}
{{- end -}}
{{- range $key := list "affinity" "topologySpreadConstraints" "securityContext" -}}
{{- with (include "tera.asWrittenBack" (list $key (get $pod $key)) | fromJson).value -}}
{{- $_ := set $spec $key . -}}
{{- end -}}
{{- end -}}
{{- range $key := list "envFrom" "volumeMounts" -}}
{{- with get $pod $key -}}
{{- $_ := set $main $key (concat (get $main $key | default list) (include "tera.asWrittenBack" (list $key .) | fromJson).value) -}}
{{- end -}}
{{- end -}}
{{- range $key, $from := dict "tolerations" "tolerations" "volumes" "volumes" "initContainers" "initContainers" "containers" "sidecars" -}}
{{- with get $pod $from -}}
{{- $added := list -}}
{{- range (include "tera.asWrittenBack" (list $key .) | fromJson).value -}}
{{- if and (has $key (list "containers" "initContainers")) (not .securityContext) -}}
{{- $_ := set . "securityContext" (include "tera.containerSecurity" $ | fromYaml) -}}
{{- end -}}
{{- $added = append $added . -}}
{{- end -}}
{{- $_ := set $spec $key (concat (get $spec $key | default list) $added) -}}
{{- end -}}
{{- end -}}
{{- toYaml $template -}}
{{- end }}

{{/* A value below a key as KubeRay writes it back, as JSON below `value`: without what is empty, and
     with canonical quantities. Otherwise KubeRay would own it, and Helm's next upgrade fail. */}}
{{- define "tera.asWrittenBack" -}}
{{- $key := first . -}}
{{- $value := last . -}}
{{- if kindIs "map" $value -}}
{{- $kept := dict -}}
{{- range $name, $each := $value -}}
{{- $each = has $key (list "requests" "limits") | ternary (dict "value" $each) (include "tera.asWrittenBack" (list $name $each) | fromJson) -}}
{{- $each = $each.value -}}
{{- if has $key (list "requests" "limits") -}}
{{- $each = include "tera.quantity" $each -}}
{{- else if eq $name "sizeLimit" -}}
{{- $each = include "tera.quantity" $each -}}
{{- end -}}
{{- if not (or (kindIs "invalid" $each) (and (eq $name "readOnly") (not $each)) (and (not (kindIs "bool" $each)) (not (kindIs "float64" $each)) (empty $each) (ne $name "emptyDir"))) -}}
{{- $_ := set $kept $name $each -}}
{{- end -}}
{{- end -}}
{{- toJson (dict "value" $kept) -}}
{{- else if kindIs "slice" $value -}}
{{- $kept := list -}}
{{- range $value -}}
{{- $kept = append $kept (include "tera.asWrittenBack" (list $key .) | fromJson).value -}}
{{- end -}}
{{- toJson (dict "value" $kept) -}}
{{- else -}}
{{- toJson (dict "value" $value) -}}
{{- end -}}
{{- end }}

{{/* The name of the service account of gateways, or of a pool's workers. Takes root, name, pod. */}}
{{- define "tera.serviceAccount" -}}
{{- $account := .pod.serviceAccount | default dict -}}
{{- $account.name | default (printf "%s-%s" .root.Release.Name .name) -}}
{{- end }}

{{/* The variables by which a process reaches what is outside of the cluster, as a list. */}}
{{- define "tera.trustEnvironment" -}}
{{- with .Values.trust }}
{{- if .caBundle.configMap }}
{{- range $name := list "SSL_CERT_FILE" "REQUESTS_CA_BUNDLE" "CURL_CA_BUNDLE" "AWS_CA_BUNDLE" }}
- {name: {{ $name }}, value: /trust/ca.crt}
{{- end }}
{{- end }}
{{- range $scheme, $proxy := pick .proxy "http" "https" }}
{{- if $proxy }}
- {name: {{ upper $scheme }}_PROXY, value: {{ quote $proxy }}}
- {name: {{ $scheme }}_proxy, value: {{ quote $proxy }}}
{{- end }}
{{- end }}
{{- if and .proxy.noProxy (or .proxy.http .proxy.https) }}
- {name: NO_PROXY, value: {{ quote .proxy.noProxy }}}
- {name: no_proxy, value: {{ quote .proxy.noProxy }}}
{{- end }}
{{- end }}
{{- end }}

{{- define "tera.trustMount" -}}
{{- if .Values.trust.caBundle.configMap }}
- {name: trust, mountPath: /trust, readOnly: true}
{{- end }}
{{- end }}

{{- define "tera.trustVolume" -}}
{{- with .Values.trust.caBundle }}
{{- if .configMap }}
- name: trust
  configMap:
    name: {{ .configMap }}
    items: [{key: {{ .key }}, path: ca.crt}]
{{- end }}
{{- end }}
{{- end }}
