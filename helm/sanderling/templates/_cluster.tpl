{{/* Probes, and the parts of a cluster's spec that RayService, RayCluster and RayJob share. */}}

{{- define "sanderling.nodeReadiness" -}}
httpGet: {path: /api/healthz, port: 52365}
periodSeconds: 5
timeoutSeconds: 5
failureThreshold: 3
{{- end -}}

{{/* A token can be made: what traffic is routed by. */}}
{{- define "sanderling.frontReadiness" -}}
httpGet: {path: /ready, port: serve}
periodSeconds: 5
timeoutSeconds: 5
failureThreshold: 2
{{- end -}}

{{- define "sanderling.auth" -}}
authOptions:
  mode: {{ .Values.ray.auth }}
  {{- if and (eq .Values.ray.auth "token") .Values.ray.existingAuthSecret }}
  secretName: {{ .Values.ray.existingAuthSecret }}
  {{- end }}
{{- end -}}

{{/* call: dict "root" $ "autoscaling" bool */}}
{{- define "sanderling.head" -}}
{{- $values := .root.Values -}}
headGroupSpec:
  serviceType: ClusterIP
  rayStartParams:
    num-cpus: "0"
    dashboard-host: 0.0.0.0
    metrics-export-port: "8080"
    object-store-memory: {{ int64 $values.head.objectStoreBytes | quote }}
    labels-file: /run/sanderling/labels.yaml
  labels:
    sanderling/role: head
  template:
    {{- $pod := dict "root" .root "pod" $values.head "component" "head" "account" "head" "vendor" "cpu" "gpus" 0 "spot" false "priority" "head" "grace" 60 "token" .autoscaling "readiness" (include "sanderling.nodeReadiness" . | fromYaml) }}
    {{- include "sanderling.rayPod" $pod | nindent 4 }}
{{- end -}}

{{- define "sanderling.autoscaler" -}}
autoscalerOptions:
  version: v2
  upscalingMode: {{ .Values.ray.autoscaler.upscalingMode }}
  idleTimeoutSeconds: {{ .Values.ray.autoscaler.idleTimeoutSeconds }}
  imagePullPolicy: {{ .Values.images.cpu.pullPolicy }}
  resources:
    {{- toYaml .Values.ray.autoscaler.resources | nindent 4 }}
  securityContext:
    {{- toYaml .Values.securityContext | nindent 4 }}
{{- end -}}

{{/* call: dict "root" $ "group" {...} "autoscaling" bool */}}
{{- define "sanderling.workerGroup" -}}
{{- $group := .group -}}
{{- $labels := dict "sanderling/role" $group.role "sanderling/offer" $group.name "sanderling/kind" $group.kind "sanderling/market" $group.market "sanderling/usd-per-h" (toString $group.usdPerHour) -}}
{{- if $group.zone -}}{{- $_ := set $labels "sanderling/zone" $group.zone -}}{{- end -}}
{{- $gpus := ternary 0 1 (eq $group.vendor "cpu") -}}
{{- $pod := deepCopy $group.pod -}}
{{- if $group.zone -}}{{- $_ := set $pod "nodeSelector" (mergeOverwrite (dict "topology.kubernetes.io/zone" $group.zone) $pod.nodeSelector) -}}{{- end -}}
- groupName: {{ $group.name }}
  replicas: {{ int $group.min }}
  minReplicas: {{ int $group.min }}
  maxReplicas: {{ int $group.max }}
  numOfHosts: 1
  {{- if .autoscaling }}
  priority: {{ int $group.priority }}
  {{- if not (kindIs "invalid" $group.idleTimeoutSeconds) }}
  idleTimeoutSeconds: {{ int $group.idleTimeoutSeconds }}
  {{- end }}
  {{- end }}
  labels:
    {{- toYaml $labels | nindent 4 }}
  rayStartParams:
    # One replica, or one worker of a training job, fits on a machine: both ask for one CPU of Ray's.
    num-cpus: "1"
    metrics-export-port: "8080"
    object-store-memory: {{ int64 $pod.objectStoreBytes | quote }}
    labels-file: /run/sanderling/labels.yaml
  template:
    {{- $call := dict "root" .root "pod" $pod "component" "worker" "account" "workers" "vendor" $group.vendor "gpus" $gpus "spot" (eq $group.market "spot") "labels" $labels "priority" "workers" "grace" (int .root.Values.drain.gracePeriodSeconds) "readiness" (include "sanderling.nodeReadiness" . | fromYaml) "spread" true "spreadLabels" (dict "sanderling/offer" $group.name) "preStop" (list "python" "-m" "serve.leaving" "--deadline-s" (int .root.Values.drain.deadlineSeconds | toString)) }}
    {{- include "sanderling.rayPod" $call | nindent 4 }}
{{- end -}}
