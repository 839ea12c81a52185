{{/* A new API key in the form of `tera.tenancy.keys`: its last six characters are the CRC-32 of all
     before them, in base 62. Helm has no exclusive or, so that is a table of half bytes. */}}
{{- define "tera.apiKey" -}}
{{- $xor := fromJsonArray "[[0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15],[1,0,3,2,5,4,7,6,9,8,11,10,13,12,15,14],[2,3,0,1,6,7,4,5,10,11,8,9,14,15,12,13],[3,2,1,0,7,6,5,4,11,10,9,8,15,14,13,12],[4,5,6,7,0,1,2,3,12,13,14,15,8,9,10,11],[5,4,7,6,1,0,3,2,13,12,15,14,9,8,11,10],[6,7,4,5,2,3,0,1,14,15,12,13,10,11,8,9],[7,6,5,4,3,2,1,0,15,14,13,12,11,10,9,8],[8,9,10,11,12,13,14,15,0,1,2,3,4,5,6,7],[9,8,11,10,13,12,15,14,1,0,3,2,5,4,7,6],[10,11,8,9,14,15,12,13,2,3,0,1,6,7,4,5],[11,10,9,8,15,14,13,12,3,2,1,0,7,6,5,4],[12,13,14,15,8,9,10,11,4,5,6,7,0,1,2,3],[13,12,15,14,9,8,11,10,5,4,7,6,1,0,3,2],[14,15,12,13,10,11,8,9,6,7,4,5,2,3,0,1],[15,14,13,12,11,10,9,8,7,6,5,4,3,2,1,0]]" -}}
{{- $step := fromJsonArray "[[0,0,0,0,0,0,0,0],[4,6,0,1,7,11,13,1],[8,12,0,2,14,6,11,3],[12,10,0,3,9,13,6,2],[0,9,1,4,12,13,6,7],[4,15,1,5,11,6,11,6],[8,5,1,6,2,11,13,4],[12,3,1,7,5,0,0,5],[0,2,3,8,8,11,13,14],[4,4,3,9,15,0,0,15],[8,14,3,10,6,13,6,13],[12,8,3,11,1,6,11,12],[0,11,2,12,4,6,11,9],[4,13,2,13,3,13,6,8],[8,7,2,14,10,0,0,10],[12,1,2,15,13,11,13,11]]" -}}
{{- $body := printf "sk-tera-%s" (randAlphaNum 36) -}}
{{- $crc := list 15 15 15 15 15 15 15 15 -}}
{{- range $position := until (len $body) -}}
{{- $byte := index $body $position | int -}}
{{- range $half := list (mod $byte 16) (div $byte 16) -}}
{{- $row := index $step (index $xor (first $crc | int) (int $half) | int) -}}
{{- $shifted := append (rest $crc) 0 -}}
{{- $crc = list -}}
{{- range $digit := until 8 -}}
{{- $crc = append $crc (index $xor (index $shifted $digit | int) (index $row $digit | int)) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- $rest := 0 -}}
{{- range $digit := reverse $crc -}}
{{- $rest = add (mul $rest 16) (sub 15 (int $digit)) -}}
{{- end -}}
{{- $digits := "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz" -}}
{{- $checksum := "" -}}
{{- range until 6 -}}
{{- $digit := mod $rest 62 | int -}}
{{- $checksum = printf "%s%s" (substr $digit (add1 $digit | int) $digits) $checksum -}}
{{- $rest = div $rest 62 -}}
{{- end -}}
{{- $body }}{{ $checksum -}}
{{- end }}

{{/* Not empty if the keys' Secret holds the first key. A Secret created without it never gets one. */}}
{{- define "tera.hasFirstKey" -}}
{{- with .Values.gateway.auth -}}
{{- if and .bootstrapKeys (not .existingSecret) -}}
{{- $old := (lookup "v1" "Secret" $.Release.Namespace (include "tera.keysSecret" $)).data | default dict -}}
{{- if or (hasKey $old "bootstrap-key") (not (hasKey $old "keys.yaml")) -}}
yes
{{- end -}}
{{- end -}}
{{- end -}}
{{- end }}
