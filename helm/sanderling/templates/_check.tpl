{{/* What a schema cannot say: contradictions between values, each named with what would be accepted. */}}
{{- define "sanderling.check" -}}
{{- range $name, $worker := include "sanderling.workers" . | fromJson -}}
{{- range $key := list "onDemand" "spot" -}}
{{- $terms := default dict (index $worker $key) -}}
{{- $min := int (default 0 $terms.min) -}}
{{- $max := int (default 0 $terms.max) -}}
{{- if gt $min $max -}}
{{- fail (printf "workers.%s.%s.min = %d is above workers.%s.%s.max = %d; a min up to the max is accepted" $name $key $min $name $key $max) -}}
{{- end -}}
{{- end -}}
{{- if and (eq (include "sanderling.vendor" $worker.kind) "rocm") (not $.Values.images.rocm.repository) -}}
{{- fail (printf "workers.%s.kind = %s needs an image with ROCm and images.rocm.repository is empty; an image that you have built is accepted" $name $worker.kind) -}}
{{- end -}}
{{- end -}}
{{- $sums := include "sanderling.sums" . | fromJson -}}
{{- range $role, $worker := $sums.spot -}}
{{- $sum := index $sums.roles $role -}}
{{- if lt (int $sum.onDemand) 1 -}}
{{- fail (printf "workers.%s.spot.max is above 0 and nothing of role %s is always on demand: when the market takes all spot machines nobody would answer; an onDemand.min of at least 1 in workers.%s or another worker of that role is accepted" $worker $role $worker) -}}
{{- end -}}
{{- end -}}
{{- if lt (int $sums.roles.decode.floor) 1 -}}
{{- fail "workers: no machine of role any or decode is always there; an onDemand.min of at least 1 is accepted" -}}
{{- end -}}
{{- $budget := float64 .Values.budget.usdPerHour -}}
{{- if and (gt $budget 0.0) (gt (float64 $sums.mostUsdPerHour) $budget) -}}
{{- fail (printf "budget.usdPerHour = %.2f: at their max the workers would cost %.2f USD/h (%.2f at their min); a higher budget or lower workers.*.max are accepted" $budget (float64 $sums.mostUsdPerHour) (float64 $sums.leastUsdPerHour)) -}}
{{- end -}}
{{- if gt $budget 0.0 -}}
{{- range include "sanderling.groups" . | fromJsonArray -}}
{{- if eq (float64 .usdPerHour) 0.0 -}}
{{- fail (printf "budget.usdPerHour = %.2f and workers.%s has no usdPerHour for its %s machines; a price above 0 is accepted" $budget .worker .market) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if and .Values.controller.enabled .Values.ray.autoscaler.enabled -}}
{{- fail "controller.enabled and ray.autoscaler.enabled are both true: two would write the replicas of one cluster; one of them is accepted" -}}
{{- end -}}
{{- if and .Values.controller.enabled (not .Values.controller.machinesKey.existingSecret) -}}
{{- fail "controller.enabled needs controller.machinesKey.existingSecret, which is empty; the name of a Secret with a random text is accepted" -}}
{{- end -}}
{{- if gt (add .Values.drain.deadlineSeconds 15 | int) (int .Values.drain.gracePeriodSeconds) -}}
{{- fail (printf "drain.deadlineSeconds = %d leaves less than 15 s of drain.gracePeriodSeconds = %d for the end; a shorter deadline is accepted" (int .Values.drain.deadlineSeconds) (int .Values.drain.gracePeriodSeconds)) -}}
{{- end -}}
{{- if and .Values.head.gcsFaultTolerance.enabled (not .Values.head.gcsFaultTolerance.redisAddress) -}}
{{- fail "head.gcsFaultTolerance.enabled needs head.gcsFaultTolerance.redisAddress, which is empty; redis:6379 or redis://host:port is accepted" -}}
{{- end -}}
{{- if and .Values.ingress.enabled (not .Values.ingress.host) -}}
{{- fail "ingress.enabled needs ingress.host, which is empty; a host name is accepted" -}}
{{- end -}}
{{- if and .Values.train.enabled (eq (include "sanderling.vendor" .Values.train.kind) "rocm") (not .Values.images.rocm.repository) -}}
{{- fail (printf "train.kind = %s needs an image with ROCm and images.rocm.repository is empty; an image that you have built is accepted" .Values.train.kind) -}}
{{- end -}}
{{- include "sanderling.checkKubeRay" . -}}
{{- end -}}

{{/* Only where a cluster answers: `helm template` knows none, and then there is nothing to say. */}}
{{- define "sanderling.checkKubeRay" -}}
{{- if lookup "v1" "ServiceAccount" .Release.Namespace "default" -}}
{{- if not (.Capabilities.APIVersions.Has "ray.io/v1/RayService") -}}
{{- fail "this cluster has no RayService of ray.io/v1: install KubeRay first (helm install kuberay-operator kuberay/kuberay-operator --version 1.7.0, CRDs included)" -}}
{{- end -}}
{{- end -}}
{{- end -}}
