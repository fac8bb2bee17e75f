{{/* Names, labels and images. */}}

{{- define "sanderling.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{/* At most 40 characters: KubeRay appends "-serve-", five letters and more to it. */}}
{{- define "sanderling.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- $name := include "sanderling.name" . -}}
{{- if contains $name .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* What never changes with a version: selectors and pod templates. */}}
{{- define "sanderling.selectorLabels" -}}
app.kubernetes.io/name: {{ include "sanderling.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{/* metadata.labels and annotations of an object. call: dict "root" $ "component" "front" */}}
{{- define "sanderling.metadata" -}}
labels:
  {{- include "sanderling.selectorLabels" .root | nindent 2 }}
  app.kubernetes.io/component: {{ .component }}
  app.kubernetes.io/part-of: sanderling
  app.kubernetes.io/managed-by: {{ .root.Release.Service }}
  app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
  helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" }}
  {{- with mergeOverwrite (dict) .root.Values.commonLabels (default dict .labels) }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- with mergeOverwrite (dict) .root.Values.commonAnnotations (default dict .annotations) }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{- define "sanderling.matchLabels" -}}
{{- include "sanderling.selectorLabels" .root }}
app.kubernetes.io/component: {{ .component }}
{{- end -}}

{{/* An image's reference. call: dict "root" $ "variant" "cuda" */}}
{{- define "sanderling.image" -}}
{{- $image := index .root.Values.images .variant -}}
{{- $registry := default $image.registry .root.Values.global.imageRegistry -}}
{{- $path := ternary (printf "%s/%s" $registry $image.repository) $image.repository (ne $registry "") -}}
{{- if $image.digest -}}
{{- printf "%s@%s" $path $image.digest -}}
{{- else -}}
{{- printf "%s:%s" $path (default (printf "%s-%s" .root.Chart.AppVersion .variant) $image.tag) -}}
{{- end -}}
{{- end -}}

{{- define "sanderling.serviceAccount" -}}
{{- $account := index .root.Values.serviceAccounts .of -}}
{{- if $account.name -}}
{{- $account.name -}}
{{- else if $account.create -}}
{{- printf "%s-%s" (include "sanderling.fullname" .root) .of -}}
{{- else -}}
default
{{- end -}}
{{- end -}}

{{- define "sanderling.priorityClass" -}}
{{- if .given -}}
{{- .given -}}
{{- else if .root.Values.priorityClasses.create -}}
{{- printf "%s-%s-%s" .root.Release.Namespace (include "sanderling.fullname" .root) .of -}}
{{- end -}}
{{- end -}}

{{/* Which image and which device plugin's resource a kind of the catalogue needs. */}}
{{- define "sanderling.vendor" -}}
{{- if eq . "cpu" -}}cpu{{- else if hasPrefix "mi" . -}}rocm{{- else -}}cuda{{- end -}}
{{- end -}}
{{- define "sanderling.deviceResource" -}}
{{- if eq . "rocm" -}}amd.com/gpu{{- else -}}nvidia.com/gpu{{- end -}}
{{- end -}}
