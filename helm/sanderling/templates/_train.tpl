{{/* call: dict "root" $ "min" 1 "max" 4 */}}
{{- define "sanderling.trainGroup" -}}
{{- $train := .root.Values.train -}}
{{- $vendor := include "sanderling.vendor" $train.kind -}}
{{- $labels := dict "sanderling/role" "train" "sanderling/kind" $train.kind -}}
{{- $pod := deepCopy $train -}}
{{- if $train.job.enabled -}}
{{- $name := printf "%s-train-job" (include "sanderling.fullname" .root) -}}
{{- $_ := set $pod "extraVolumes" (append $train.extraVolumes (dict "name" "job" "configMap" (dict "name" $name "items" (list (dict "key" "job.toml" "path" "job.toml"))))) -}}
{{- $_ := set $pod "extraVolumeMounts" (append $train.extraVolumeMounts (dict "name" "job" "mountPath" "/etc/sanderling/job" "readOnly" true)) -}}
{{- end -}}
- groupName: train
  replicas: {{ int .min }}
  minReplicas: {{ int .min }}
  maxReplicas: {{ int .max }}
  numOfHosts: 1
  labels:
    {{- toYaml $labels | nindent 4 }}
  rayStartParams:
    num-cpus: "1"
    metrics-export-port: "8080"
    object-store-memory: {{ int64 $train.objectStoreBytes | quote }}
    labels-file: /run/sanderling/labels.yaml
  template:
    {{- $call := dict "root" .root "pod" $pod "component" "train" "account" "workers" "vendor" $vendor "gpus" (ternary 0 (int $train.gpus) (eq $vendor "cpu")) "spot" $train.spot "labels" $labels "priority" "workers" "grace" (int .root.Values.drain.gracePeriodSeconds) "readiness" (include "sanderling.nodeReadiness" . | fromYaml) }}
    {{- include "sanderling.rayPod" $call | nindent 4 }}
{{- end -}}

{{/* A RayJob with a cluster of its own, which Ray's autoscaler alone scales. */}}
{{- define "sanderling.rayJob" -}}
apiVersion: ray.io/v1
kind: RayJob
metadata:
  generateName: {{ include "sanderling.fullname" . }}-train-
  namespace: {{ .Release.Namespace }}
  labels:
    {{- include "sanderling.matchLabels" (dict "root" . "component" "train") | nindent 4 }}
spec:
  entrypoint: sanderling train /etc/sanderling/job/job.toml
  entrypointNumCpus: 1
  {{- /* How long a stop waits for the step under way and its checkpoint; Ray itself waits 3 s. */}}
  runtimeEnvYAML: |
    env_vars:
      RAY_JOB_STOP_WAIT_TIME_S: "600"
  submissionMode: HTTPMode
  shutdownAfterJobFinishes: true
  backoffLimit: {{ .Values.train.job.backoffLimit }}
  activeDeadlineSeconds: {{ int .Values.train.job.activeDeadlineSeconds }}
  ttlSecondsAfterFinished: {{ int .Values.train.job.ttlSecondsAfterFinished }}
  rayClusterSpec:
    rayVersion: {{ .Values.ray.version | quote }}
    enableInTreeAutoscaling: true
    {{- include "sanderling.autoscaler" . | nindent 4 }}
    {{- include "sanderling.auth" . | nindent 4 }}
    {{- include "sanderling.head" (dict "root" . "autoscaling" true) | nindent 4 }}
    workerGroupSpecs:
      {{- include "sanderling.trainGroup" (dict "root" . "min" 0 "max" .Values.train.job.maxWorkers) | nindent 6 }}
{{- end -}}
