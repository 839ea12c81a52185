{{/* A quantity as Kubernetes itself writes it, 2 for 2000m and 4Gi for 4096Mi: `canonical` of
     `tera.config.quantity`. KubeRay reads a RayService and writes it back whole. What it writes in another
     way than we do is its own from then on, and Helm's next upgrade a conflict. */}}
{{- define "tera.quantity" -}}
{{- $text := kindIs "string" . | ternary . (printf "%f" (float64 .)) -}}
{{- $suffix := regexFind "[a-zA-Z]*$" $text -}}
{{- $parts := trimSuffix $suffix $text | splitList "." -}}
{{- $whole := regexReplaceAll "^0+" (first $parts) "" -}}
{{- $fraction := regexReplaceAll "0+$" (rest $parts | join "") "" -}}
{{- if hasSuffix "i" $suffix -}}
  {{- include "tera.binaryQuantity" (list $whole $fraction $suffix) -}}
{{- else -}}
  {{- $units := list "n" "u" "m" "" "k" "M" "G" "T" "P" "E" -}}
  {{- /* The power of ten of the last digit, counted from that of "n". */ -}}
  {{- $power := sub (mul 3 (get (dict "m" 2 "" 3 "k" 4 "M" 5 "G" 6 "T" 7 "P" 8 "E" 9) $suffix)) (len $fraction) -}}
  {{- $digits := regexReplaceAll "^0+" (print $whole $fraction) "" -}}
  {{- $shortest := regexReplaceAll "0+$" $digits "" -}}
  {{- if $shortest -}}
    {{- $power = add $power (sub (len $digits) (len $shortest)) -}}
    {{- $unit := min 9 (div $power 3) -}}
    {{- $shortest }}{{ repeat (sub $power (mul 3 $unit) | int) "0" }}{{ index $units $unit -}}
  {{- else -}}
    0
  {{- end -}}
{{- end -}}
{{- end }}

{{/* How much a quantity is, to compare: bytes, or cores. */}}
{{- define "tera.amount" -}}
{{- $canonical := include "tera.quantity" . -}}
{{- $suffix := regexFind "[a-zA-Z]*$" $canonical -}}
{{- $units := dict "n" 1e-9 "u" 1e-6 "m" 1e-3 "" 1.0 "k" 1e3 "M" 1e6 "G" 1e9 "T" 1e12 "P" 1e15 "E" 1e18
      "Ki" 1024.0 "Mi" 1048576.0 "Gi" 1073741824.0 "Ti" 1099511627776.0 "Pi" 1125899906842624.0 "Ei" 1152921504606846976.0 -}}
{{- mulf (trimSuffix $suffix $canonical | float64) (get $units $suffix) -}}
{{- end }}

{{/* A quantity with a binary suffix, from its whole part, its fraction and its suffix. */}}
{{- define "tera.binaryQuantity" -}}
{{- $units := list "" "Ki" "Mi" "Gi" "Ti" "Pi" "Ei" -}}
{{- $fraction := index . 1 -}}
{{- $unit := get (dict "Ki" 1 "Mi" 2 "Gi" 3 "Ti" 4 "Pi" 5 "Ei" 6) (last .) -}}
{{- $number := int64 (first .) -}}
{{- $rest := regexReplaceAll "^0+" $fraction "" | int64 -}}
{{- $one := printf "1%s" (repeat (len $fraction) "0") | int64 -}}
{{- range until $unit -}}
  {{- if $rest -}}
    {{- $rest = mul $rest 1024 -}}
    {{- $number = add (mul $number 1024) (div $rest $one) -}}
    {{- $rest = mod $rest $one -}}
    {{- $unit = sub $unit 1 -}}
  {{- end -}}
{{- end -}}
{{- range until (sub 6 $unit | int) -}}
  {{- if not (or $rest (mod $number 1024)) -}}
    {{- $number = div $number 1024 -}}
    {{- $unit = add1 $unit -}}
  {{- end -}}
{{- end -}}
{{- if and $unit $number -}}
  {{- $number }}{{ index $units $unit -}}
{{- else -}}
  {{- /* Without a binary suffix the number reads as a decimal one, and 64000 is written as 64k. */ -}}
  {{- include "tera.quantity" (printf "%d.%0*d" $number (len $fraction) $rest) -}}
{{- end -}}
{{- end }}
