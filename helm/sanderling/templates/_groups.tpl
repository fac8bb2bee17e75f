{{/*
Worker groups: one for each entry of .Values.workers and each market that it may buy on. JSON, a list
of {name, worker, kind, vendor, market, role, min, max, usdPerHour, zone, priority, pod}; `pod` is
workerDefaults, the worker and the market merged, with tolerations added up instead of replaced.
*/}}
{{- define "sanderling.groups" -}}
{{- $groups := list -}}
{{- range $name, $worker := include "sanderling.workers" . | fromJson -}}
{{- range $key, $market := dict "onDemand" "on_demand" "spot" "spot" -}}
{{- $terms := default dict (index $worker $key) -}}
{{- if gt (int (default 0 $terms.max)) 0 -}}
{{- $pod := mergeOverwrite (deepCopy $.Values.workerDefaults) (omit $worker "onDemand" "spot") (pick $terms "nodeSelector" "affinity" "priorityClassName") -}}
{{- $tolerations := concat $.Values.workerDefaults.tolerations (default list $worker.tolerations) (default list $terms.tolerations) -}}
{{- $_ := set $pod "tolerations" $tolerations -}}
{{- $group := dict "name" (printf "%s-%s" $name (ternary "spot" "od" (eq $key "spot"))) "worker" $name "kind" $worker.kind "vendor" (include "sanderling.vendor" $worker.kind) "market" $market "role" $pod.role "min" (int (default 0 $terms.min)) "max" (int $terms.max) "usdPerHour" (default 0 $terms.usdPerHour) "zone" (default "" $worker.zone) "priority" (int (default 0 $terms.priority)) "idleTimeoutSeconds" $terms.idleTimeoutSeconds "pod" $pod -}}
{{- $groups = append $groups $group -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- toJson $groups -}}
{{- end -}}

{{/* Those of the values, or else one CPU worker; a default in values.yaml would stay beside yours. JSON. */}}
{{- define "sanderling.workers" -}}
{{- $one := dict "cpu" (dict "kind" "cpu" "onDemand" (dict "min" 1 "max" 1)) -}}
{{- ternary .Values.workers $one (gt (len .Values.workers) 0) | toJson -}}
{{- end -}}

{{/* Sums over groups: floors and caps by role, and what they cost in an hour. JSON. */}}
{{- define "sanderling.sums" -}}
{{- $sums := dict "decode" (dict "floor" 0 "cap" 0 "onDemand" 0) "prefill" (dict "floor" 0 "cap" 0 "onDemand" 0) -}}
{{- $least := 0.0 -}}
{{- $most := 0.0 -}}
{{- $spot := dict -}}
{{- range include "sanderling.groups" . | fromJsonArray -}}
{{- $role := ternary "prefill" "decode" (eq .role "prefill") -}}
{{- $sum := index $sums $role -}}
{{- $_ := set $sum "floor" (add $sum.floor .min) -}}
{{- $_ := set $sum "cap" (add $sum.cap .max) -}}
{{- if eq .market "on_demand" -}}
{{- $_ := set $sum "onDemand" (add $sum.onDemand .min) -}}
{{- else -}}
{{- $_ := set $spot $role .worker -}}
{{- end -}}
{{- $least = addf $least (mulf (float64 .min) (float64 .usdPerHour)) -}}
{{- $most = addf $most (mulf (float64 .max) (float64 .usdPerHour)) -}}
{{- end -}}
{{- toJson (dict "roles" $sums "spot" $spot "leastUsdPerHour" $least "mostUsdPerHour" $most) -}}
{{- end -}}
