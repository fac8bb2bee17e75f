{{/* Names, and addresses outside: never the machine's metadata service. */}}
{{- define "sanderling.egress" -}}
- to:
    - namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: kube-system}}
  ports: [{port: 53, protocol: UDP}, {port: 53, protocol: TCP}]
- to:
    - ipBlock: {cidr: {{ .Values.networkPolicy.egress.cidr }}, except: {{ toJson .Values.networkPolicy.egress.except }}}
  ports:
    {{- range .Values.networkPolicy.egress.ports }}
    - {port: {{ . }}, protocol: TCP}
    {{- end }}
{{- with .Values.networkPolicy.extraEgress }}
{{ toYaml . }}
{{- end }}
{{- end -}}
