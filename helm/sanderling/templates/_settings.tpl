{{/*
The one settings file, sanderling.toml: what .Values.settings says and what the chart derives. The
same text is read by the ingress, the replicas and the controller.
*/}}
{{- define "sanderling.settings" -}}
{{- $sums := include "sanderling.sums" . | fromJson -}}
{{- $decode := $sums.roles.decode -}}
{{- $prefill := $sums.roles.prefill -}}
{{- $derived := dict
  "data_dir" "/var/lib/sanderling"
  "http" (dict "host" "0.0.0.0" "port" 8000 "proxy" "python")
  "ray" (dict "address" "auto" "auth" .Values.ray.auth)
  "observe" (dict "log_format" "json")
  "decode" (dict "replicas" (int $decode.floor) "cpus" 1 "labels" (dict "sanderling/role" "in(any,decode)"))
  "prefill" (dict "replicas" (int $prefill.floor) "cpus" 1 "labels" (dict "sanderling/role" "prefill"))
  "autoscale" (dict
    "decode" (dict "floor" (int $decode.floor) "cap" (int $decode.cap) "on_demand" (int $decode.onDemand))
    "prefill" (dict "floor" (int $prefill.floor) "cap" (int $prefill.cap) "on_demand" (int $prefill.onDemand)))
-}}
{{- if .Values.controller.enabled -}}
{{- $name := include "sanderling.fullname" . -}}
{{- $_ := set $derived.autoscale "provider" "kubernetes" -}}
{{- $_ := set $derived.autoscale "health_port" (int .Values.controller.port) -}}
{{- $_ := set $derived.autoscale "service_url" (printf "http://%s.%s.svc:%d" $name .Release.Namespace (int .Values.service.port)) -}}
{{- $_ := set $derived.autoscale "service_key_file" "/etc/sanderling/machines/key" -}}
{{- $_ := set $derived.autoscale "kubernetes" (dict "namespace" .Release.Namespace "service" (printf "%s-serve" $name) "lease" (printf "%s-controller" $name)) -}}
{{- end -}}
{{- if .Values.apiKeys.existingSecret -}}
{{- $_ := set $derived.http "api_keys_file" (printf "/etc/sanderling/keys/%s" .Values.apiKeys.key) -}}
{{- end -}}
{{- /* A replica in a pod has the pod's CPUs to itself; Ray is told of one, so that one fits. */ -}}
{{- $cpus := list -}}
{{- range include "sanderling.groups" . | fromJsonArray -}}
{{- if eq .vendor "cpu" -}}{{- $cpus = append $cpus (include "sanderling.wholeCpus" .pod.resources.requests.cpu | int) -}}{{- end -}}
{{- end -}}
{{- if $cpus -}}
{{- $threads := index (sortAlpha $cpus) 0 | int -}}
{{- range $cpus -}}{{- if lt (int .) $threads -}}{{- $threads = int . -}}{{- end -}}{{- end -}}
{{- $_ := set $derived.decode "threads" $threads -}}
{{- $_ := set $derived.prefill "threads" $threads -}}
{{- end -}}
{{- toJson (mergeOverwrite $derived (deepCopy .Values.settings)) -}}
{{- end -}}

{{/* CPUs of a quantity, rounded down, at least 1: "2" and "2500m" are 2. */}}
{{- define "sanderling.wholeCpus" -}}
{{- $text := toString . -}}
{{- if hasSuffix "m" $text -}}
{{- max 1 (div (trimSuffix "m" $text | int) 1000) -}}
{{- else -}}
{{- max 1 (float64 $text | int) -}}
{{- end -}}
{{- end -}}

{{/* What pods of Ray read of the settings: a change here needs a new cluster. Floors, caps and first
counts of replicas are the autoscaler's, which can live with a change. */}}
{{- define "sanderling.checksum" -}}
{{- $settings := include "sanderling.settings" . | fromJson -}}
{{- $kept := omit $settings "autoscale" -}}
{{- if .Values.controller.enabled -}}
{{- $_ := unset $kept.decode "replicas" -}}
{{- $_ := unset $kept.prefill "replicas" -}}
{{- end -}}
{{- toJson $kept | sha256sum -}}
{{- end -}}

{{/* A table as TOML: its values, then the tables in it. call: dict "path" "" "table" $dict */}}
{{- define "sanderling.toml" -}}
{{- $path := .path -}}
{{- range $key, $value := .table -}}
{{- if not (or (kindIs "map" $value) (kindIs "invalid" $value)) }}
{{ include "sanderling.tomlKey" $key }} = {{ include "sanderling.tomlValue" $value }}
{{- end -}}
{{- end -}}
{{- range $key, $value := .table -}}
{{- if kindIs "map" $value -}}
{{- $inner := ternary (include "sanderling.tomlKey" $key) (printf "%s.%s" $path (include "sanderling.tomlKey" $key)) (eq $path "") }}

[{{ $inner }}]
{{- include "sanderling.toml" (dict "path" $inner "table" $value) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "sanderling.tomlKey" -}}
{{- if regexMatch "^[A-Za-z0-9_-]+$" . -}}{{ . }}{{- else -}}{{ toJson . }}{{- end -}}
{{- end -}}

{{/* Helm reads every number as a float; a whole one is an integer again here. */}}
{{- define "sanderling.tomlValue" -}}
{{- if kindIs "float64" . -}}
{{- if and (eq (floor .) .) (lt . 9007199254740992.0) (gt . -9007199254740992.0) -}}{{ int64 . }}{{- else -}}{{ toJson . }}{{- end -}}
{{- else -}}
{{- toJson . -}}
{{- end -}}
{{- end -}}
