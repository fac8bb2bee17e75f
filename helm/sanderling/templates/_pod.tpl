{{/*
A pod template of a Ray cluster. call: dict
  "root" $, "pod" the values of the pod (resources, tolerations, ...), "component" head|front|worker|train,
  "account" head|workers, "vendor" cpu|cuda|rocm, "gpus" how many, "spot" bool, "keepOffSpot" bool,
  "labels" pod labels, "preStop" a command, "grace" seconds, "readiness" a probe, "spread" labels
*/}}
{{- define "sanderling.rayPod" -}}
{{- $root := .root -}}
{{- $pod := .pod -}}
metadata:
  labels:
    {{- include "sanderling.matchLabels" (dict "root" $root "component" .component) | nindent 4 }}
    {{- with mergeOverwrite (dict) $root.Values.commonLabels $pod.podLabels (default dict .labels) }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  annotations:
    checksum/settings: {{ include "sanderling.checksum" $root }}
    {{- if eq .component "head" }}
    cluster-autoscaler.kubernetes.io/safe-to-evict: "false"
    karpenter.sh/do-not-disrupt: "true"
    {{- end }}
    {{- with $pod.podAnnotations }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
spec:
  serviceAccountName: {{ include "sanderling.serviceAccount" (dict "root" $root "of" .account) }}
  automountServiceAccountToken: {{ default false .token }}
  {{- /* Otherwise the cluster sets SANDERLING_SERVICE_HOST, which would be read as a setting. */}}
  enableServiceLinks: false
  terminationGracePeriodSeconds: {{ .grace }}
  {{- with include "sanderling.priorityClass" (dict "root" $root "given" $pod.priorityClassName "of" .priority) }}
  priorityClassName: {{ . }}
  {{- end }}
  {{- with $pod.runtimeClassName }}
  runtimeClassName: {{ . }}
  {{- end }}
  securityContext:
    {{- toYaml $root.Values.podSecurityContext | nindent 4 }}
  {{- with $root.Values.global.imagePullSecrets }}
  imagePullSecrets:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $pod.nodeSelector }}
  nodeSelector:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with include "sanderling.tolerations" . | fromJsonArray }}
  tolerations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with include "sanderling.affinity" . | fromJson }}
  affinity:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- if and .spread $pod.topologySpread.enabled }}
  topologySpreadConstraints:
    - topologyKey: {{ $pod.topologySpread.topologyKey }}
      maxSkew: {{ $pod.topologySpread.maxSkew }}
      whenUnsatisfiable: {{ $pod.topologySpread.whenUnsatisfiable }}
      labelSelector:
        matchLabels:
          {{- include "sanderling.matchLabels" (dict "root" $root "component" .component) | nindent 10 }}
          {{- with .spreadLabels }}
          {{- toYaml . | nindent 10 }}
          {{- end }}
  {{- end }}
  initContainers:
    {{- /* Ray takes a file of labels; which machine this is, only the pod knows. */}}
    - name: node-labels
      image: {{ include "sanderling.image" (dict "root" $root "variant" .vendor) }}
      imagePullPolicy: {{ (index $root.Values.images .vendor).pullPolicy }}
      command: [sh, -c, 'printf "sanderling/machine: \"%s\"\n" "$POD_NAME" > /run/sanderling/labels.yaml']
      env:
        - name: POD_NAME
          valueFrom: {fieldRef: {fieldPath: metadata.name}}
      resources:
        requests: {cpu: 10m, memory: 16Mi, ephemeral-storage: 10Mi}
        limits: {cpu: 100m, memory: 64Mi, ephemeral-storage: 10Mi}
      securityContext:
        {{- toYaml $root.Values.securityContext | nindent 8 }}
      volumeMounts:
        - {name: run, mountPath: /run/sanderling}
  containers:
    - name: ray-{{ .component }}
      image: {{ include "sanderling.image" (dict "root" $root "variant" .vendor) }}
      imagePullPolicy: {{ (index $root.Values.images .vendor).pullPolicy }}
      securityContext:
        {{- toYaml $root.Values.securityContext | nindent 8 }}
      env:
        {{- include "sanderling.rayEnvironment" . | nindent 8 }}
      {{- with $pod.extraEnvFrom }}
      envFrom:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      ports:
        {{- if eq .component "head" }}
        - {name: gcs-server, containerPort: 6379, protocol: TCP}
        - {name: dashboard, containerPort: 8265, protocol: TCP}
        - {name: client, containerPort: 10001, protocol: TCP}
        {{- end }}
        {{- if ne .component "train" }}
        - {name: serve, containerPort: 8000, protocol: TCP}
        {{- end }}
        - {name: metrics, containerPort: 8080, protocol: TCP}
      resources:
        {{- $resources := deepCopy $pod.resources }}
        {{- if gt (int .gpus) 0 }}
        {{- $device := default (include "sanderling.deviceResource" .vendor) $pod.deviceResource }}
        {{- $_ := set $resources.requests $device (toString .gpus) }}
        {{- $_ := set $resources.limits $device (toString .gpus) }}
        {{- end }}
        {{- toYaml $resources | nindent 8 }}
      startupProbe:
        httpGet: {path: /api/healthz, port: 52365}
        periodSeconds: 5
        timeoutSeconds: 5
        failureThreshold: 120
      readinessProbe:
        {{- toYaml .readiness | nindent 8 }}
      livenessProbe:
        httpGet: {path: /api/healthz, port: 52365}
        periodSeconds: 10
        timeoutSeconds: 5
        failureThreshold: 6
      {{- with .preStop }}
      lifecycle:
        preStop:
          exec:
            command: {{ toJson . }}
      {{- end }}
      volumeMounts:
        {{- include "sanderling.rayMounts" . | nindent 8 }}
  volumes:
    {{- include "sanderling.rayVolumes" . | nindent 4 }}
{{- end -}}

{{- define "sanderling.rayEnvironment" -}}
- name: POD_NAME
  valueFrom: {fieldRef: {fieldPath: metadata.name}}
- {name: HOME, value: /home/sanderling}
- {name: TMPDIR, value: /tmp}
- {name: XDG_CACHE_HOME, value: /var/lib/sanderling/cache}
- {name: HF_HOME, value: /var/lib/sanderling/huggingface}
- {name: TRITON_CACHE_DIR, value: /var/lib/sanderling/triton}
- {name: RAY_SERVE_ENABLE_HA_PROXY, value: "0"}
- {name: RAY_USAGE_STATS_ENABLED, value: "0"}
{{- if .root.Values.huggingface.existingSecret }}
- {name: HF_TOKEN_PATH, value: /etc/sanderling/huggingface/token}
{{- end }}
{{- with .pod.extraEnv }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "sanderling.rayMounts" -}}
- {name: settings, mountPath: /etc/sanderling/settings, readOnly: true}
- {name: run, mountPath: /run/sanderling}
- {name: data, mountPath: /var/lib/sanderling}
- {name: home, mountPath: /home/sanderling}
- {name: tmp, mountPath: /tmp}
- {name: shared-mem, mountPath: /dev/shm}
{{- if and .root.Values.apiKeys.existingSecret (ne .component "train") }}
- {name: keys, mountPath: /etc/sanderling/keys, readOnly: true}
{{- end }}
{{- if and .root.Values.controller.enabled (ne .component "train") }}
- {name: machines, mountPath: /etc/sanderling/machines, readOnly: true}
{{- end }}
{{- if .root.Values.huggingface.existingSecret }}
- {name: huggingface, mountPath: /etc/sanderling/huggingface, readOnly: true}
{{- end }}
{{- with .pod.extraVolumeMounts }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "sanderling.rayVolumes" -}}
- name: settings
  configMap: {name: {{ include "sanderling.fullname" .root }}-settings}
- name: run
  emptyDir: {sizeLimit: 16Mi}
- name: data
  emptyDir: {}
- name: home
  emptyDir: {sizeLimit: 1Gi}
- name: tmp
  emptyDir: {sizeLimit: 8Gi}
- name: shared-mem
  emptyDir: {medium: Memory, sizeLimit: {{ .pod.sharedMemory }}}
{{- if and .root.Values.apiKeys.existingSecret (ne .component "train") }}
- name: keys
  secret: {secretName: {{ .root.Values.apiKeys.existingSecret }}}
{{- end }}
{{- if and .root.Values.controller.enabled (ne .component "train") }}
{{ include "sanderling.machinesVolume" .root }}
{{- end }}
{{- if .root.Values.huggingface.existingSecret }}
- name: huggingface
  secret:
    secretName: {{ .root.Values.huggingface.existingSecret }}
    items: [{key: {{ .root.Values.huggingface.key }}, path: token}]
{{- end }}
{{- with .pod.extraVolumes }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* The pod's own, those of its device, and on spot those that clouds put on such nodes. JSON. */}}
{{- define "sanderling.tolerations" -}}
{{- $all := default list .pod.tolerations -}}
{{- if gt (int .gpus) 0 -}}
{{- $device := default (include "sanderling.deviceResource" .vendor) .pod.deviceResource -}}
{{- $all = append $all (dict "key" $device "operator" "Exists" "effect" "NoSchedule") -}}
{{- end -}}
{{- if .spot -}}
{{- range .root.Values.spotNodes.labels -}}
{{- $all = append $all (dict "key" .key "operator" "Equal" "value" .value "effect" "NoSchedule") -}}
{{- end -}}
{{- end -}}
{{- toJson $all -}}
{{- end -}}

{{/* Spot pods go to nodes with any of the spot labels, all others to nodes with none. JSON. */}}
{{- define "sanderling.affinity" -}}
{{- $terms := list -}}
{{- if .spot -}}
{{- range .root.Values.spotNodes.labels -}}
{{- $terms = append $terms (dict "matchExpressions" (list (dict "key" .key "operator" "In" "values" (list .value)))) -}}
{{- end -}}
{{- else -}}
{{- $none := list -}}
{{- range .root.Values.spotNodes.labels -}}
{{- $none = append $none (dict "key" .key "operator" "NotIn" "values" (list .value)) -}}
{{- end -}}
{{- if $none -}}{{- $terms = list (dict "matchExpressions" $none) -}}{{- end -}}
{{- end -}}
{{- $computed := dict -}}
{{- if $terms -}}
{{- $computed = dict "nodeAffinity" (dict "requiredDuringSchedulingIgnoredDuringExecution" (dict "nodeSelectorTerms" $terms)) -}}
{{- end -}}
{{- toJson (mergeOverwrite $computed (deepCopy .pod.affinity)) -}}
{{- end -}}

{{- define "sanderling.machinesVolume" -}}
- name: machines
  secret:
    secretName: {{ .Values.controller.machinesKey.existingSecret }}
    items: [{key: {{ .Values.controller.machinesKey.key }}, path: key}]
{{- end -}}
