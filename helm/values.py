"""The chart's values one by one; see schema.py for what they are made of."""

from helm.schema import (
    Schema,
    choice,
    flag,
    foreign,
    foreign_list,
    image,
    integer,
    kinds,
    number,
    pod,
    ray_pod,
    resources,
    secret,
    settings,
    spread,
    table,
    text,
    texts,
)

NAME = "^[a-z]([-a-z0-9]{0,22}[a-z0-9])?$"
CIDR = r"^[0-9]{1,3}(\.[0-9]{1,3}){3}/[0-9]{1,2}$"


def schema() -> Schema:
    """values.schema.json."""
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "Values of the chart sanderling",
        **table(
            "Every value there is; an unknown name is refused.",
            {**_general(), **_machines(), **_pods(), **_cluster(), **_access(), **_train()},
        ),
    }


def _general() -> dict[str, Schema]:
    images = {name: image(said) for name, said in IMAGES.items()}
    properties = {
        "imageRegistry": text("Registry of all images; empty: each one's own."),
        "imagePullSecrets": foreign_list("Secrets to pull with, as [{name: x}]."),
    }
    keys = secret("API keys by tenant, hashed.", "Key of it, a file name.")
    keys["properties"]["test"] = secret("A plain key for `helm test`.", "Key of it.")
    return {
        "nameOverride": text("Instead of the chart's name.", maxLength=40),
        "fullnameOverride": text("Instead of release and chart.", maxLength=40),
        "commonLabels": texts("Labels of every object and pod."),
        "commonAnnotations": texts("Annotations of every object (sync options, for instance)."),
        # Parents of this chart share `global` among their charts.
        "global": {**table("For all images.", properties), "additionalProperties": True},
        "images": table("Images by what they compute with.", images),
        "settings": settings(),
        "apiKeys": keys,
        "huggingface": secret("A token for gated models.", "Key of it."),
        "extraObjects": {
            "type": "array",
            "description": "More objects of the release; texts are templates.",
            "items": {"type": ["object", "string"]},
        },
        "tests": table("`helm test`.", {"enabled": flag("Whether there is the pod that asks.")}),
    }


IMAGES = {"cpu": "CPUs, head and controller", "cuda": "NVIDIA GPUs", "rocm": "AMD GPUs"}


def _machines() -> dict[str, Schema]:
    said = "Most that all workers at their max may cost in an hour; 0: no limit."
    return {
        "budget": table("Money.", {"usdPerHour": number(said, 0)}),
        "workers": {
            "type": "object",
            "description": "Machines by name; empty: one CPU worker.",
            "patternProperties": {NAME: _worker()},
            "additionalProperties": False,
        },
        "workerDefaults": table(
            "What workers have unless they say otherwise.",
            {**_worker_pod(), **spread()},
        ),
        "spotNodes": table("How spot nodes are known.", {"labels": _spot_labels()}),
        "drain": table(
            "The end of a worker.",
            {
                "deadlineSeconds": integer("Time for its requests to go elsewhere.", 1, 105),
                "gracePeriodSeconds": integer("Time until it is killed.", 1, 120),
            },
        ),
    }


def _worker_pod() -> dict[str, Schema]:
    return {
        **ray_pod("a worker"),
        "role": choice("Which replicas it takes.", "any", "decode", "prefill"),
        "runtimeClassName": text("Its runtime class."),
    }


def _worker() -> Schema:
    return table(
        "One kind of machine.",
        {
            **_worker_pod(),
            **spread(),
            "kind": choice("Kind of GPU in the catalogue, or cpu.", *kinds()),
            "zone": text("Zone that its nodes are in; empty: any."),
            "deviceResource": text("The device plugin's resource, if not the usual one."),
            "onDemand": _terms("on demand"),
            "spot": _terms("on spot"),
        },
        ("kind",),
    )


def _terms(market: str) -> Schema:
    return table(
        f"How many {market}.",
        {
            "min": integer("Fewest.", 0, 1024),
            "max": integer("Most; 0: none.", 0, 1024),
            "usdPerHour": number("Price of one in USD/h, as far as you know it.", 0),
            "priority": integer("For Ray's autoscaler: higher first.", -1000, 1000),
            "idleTimeoutSeconds": integer("For Ray's autoscaler: idle so long, it goes.", 0, 86400),
            "nodeSelector": texts("Labels that its node must have."),
            "tolerations": foreign_list("Taints that it tolerates, too."),
            "affinity": foreign("Replaces the affinity."),
            "priorityClassName": text("Its priority class."),
        },
        ("max",),
    )


def _spot_labels() -> Schema:
    label = table("A label.", {"key": text("Its name."), "value": text("Its value.")})
    said = "Any of these labels says that a node is spot."
    return {"type": "array", "description": said, "items": {**label, "required": ["key", "value"]}}


def _pods() -> dict[str, Schema]:
    fault = table(
        "Ray's state in a Redis of yours, so that a lost head is only a pause.",
        {
            "enabled": flag("Whether it is used."),
            "redisAddress": text("Its address, redis:6379 or redis://host:port."),
            "externalStorageNamespace": text("Name of the state in it; empty: KubeRay's choice."),
            "existingSecret": text("Secret with its password."),
            "usernameKey": text("Key of the user; empty: none."),
            "passwordKey": text("Key of the password."),
        },
    )
    return {
        "head": table("Ray's head.", {**ray_pod("the head"), "gcsFaultTolerance": fault}),
        "front": table(
            "The pods that take requests.",
            {**ray_pod("a front"), **spread(), "replicas": integer("How many.", 1, 64)},
        ),
        "controller": table(
            "The autoscaler.",
            {
                **pod("a controller"),
                **spread(),
                "enabled": flag("Whether it runs."),
                "replicas": integer("How many; one of them leads, by a Lease.", 1, 5),
                "port": integer("Port of /healthz and /metrics.", 1024, 65535),
                "machinesKey": secret("What it shows the service to place replicas.", "Key of it."),
            },
        ),
    }


def _cluster() -> dict[str, Schema]:
    autoscaler = table(
        "Ray's own autoscaler, instead of the controller.",
        {
            "enabled": flag("Whether it runs."),
            "idleTimeoutSeconds": integer("Idle so long, a machine goes.", 0, 86400),
            "upscalingMode": choice("How fast.", "Default", "Aggressive", "Conservative"),
            "resources": resources("CPU and memory of it."),
        },
    )
    ray = {
        "version": text("Version of Ray in the images.", pattern=r"^[0-9]+\.[0-9]+\.[0-9]+$"),
        "auth": choice("Whether Ray's ports ask for a token.", "token", "disabled"),
        "existingAuthSecret": text("Secret with the token; empty: KubeRay makes one."),
        "autoscaler": autoscaler,
        "upgradeStrategy": choice("How a changed cluster takes over.", "NewCluster", "None"),
        "clusterDeletionDelaySeconds": integer("How long the old one stays.", 0, 86400),
        "suspend": flag("Take all pods away, keep the service's definition."),
    }
    classes = {
        name: integer(f"Value of the class of {name}.", -2147483648, 1000000000)
        for name in ("head", "front", "workers")
    }
    monitor = {
        "enabled": flag("Whether there is one."),
        "labels": texts("Labels that your Prometheus selects by."),
    }
    return {
        "ray": table("Ray.", ray),
        "priorityClasses": table(
            "Priority classes.", {"create": flag("Whether the release has them."), **classes}
        ),
        "podDisruptionBudgets": table("Budgets.", {"enabled": flag("Whether there are any.")}),
        "monitoring": table(
            "For the Prometheus operator and Grafana.",
            {
                "serviceMonitor": table(
                    "Scraping of front, controller and Ray.",
                    {**monitor, "interval": text("How often.", pattern="^[0-9]+(s|m)$")},
                ),
                "prometheusRule": table(
                    "Alerts.", {**monitor, "ttftSeconds": number("Slow from here on.", 0)}
                ),
                "dashboard": table(
                    "A ConfigMap for Grafana's sidecar.",
                    {**monitor, "annotations": texts("Annotations of it.")},
                ),
            },
        ),
    }


def _access() -> dict[str, Schema]:
    account = {
        "create": flag("Whether the release has it."),
        "name": text("Its name; empty: the release's."),
        "annotations": texts("Annotations, such as eks.amazonaws.com/role-arn."),
    }
    accounts = {name: table(f"Of {name}.", account) for name in ("head", "workers", "controller")}
    egress = table(
        "Addresses outside that pods may reach.",
        {
            "cidr": text("Which.", pattern=CIDR),
            "except": {
                "type": "array",
                "description": "Of them not these: the metadata services.",
                "items": {"type": "string", "pattern": CIDR},
            },
            "ports": {
                "type": "array",
                "description": "On these ports.",
                "items": {"type": "integer", "minimum": 1, "maximum": 65535},
            },
        },
    )
    peers = {
        "clients": foreign_list("Who may ask the front, as NetworkPolicy peers."),
        "monitoring": foreign_list("Who may read metrics."),
        "operator": foreign_list("Where KubeRay's operator is."),
    }
    return {
        "serviceAccounts": table("Accounts of the pods.", accounts),
        "rbac": table("Rights.", {"create": flag("Whether the release has them.")}),
        "podSecurityContext": foreign("Of every pod."),
        "securityContext": foreign("Of every container."),
        "networkPolicy": table(
            "Who talks to whom.",
            {
                "enabled": flag("Whether it is limited."),
                **peers,
                "egress": egress,
                "extraEgress": foreign_list("More rules for what goes out."),
            },
        ),
        "service": table(
            "The Service in front.",
            {
                "type": choice("Its type.", "ClusterIP", "NodePort", "LoadBalancer"),
                "port": integer("Its port.", 1, 65535),
                "annotations": texts("Annotations of it."),
            },
        ),
        "ingress": table(
            "An Ingress before it.",
            {
                "enabled": flag("Whether there is one."),
                "className": text("Its class."),
                "host": text("Host name."),
                "tlsSecret": text("Secret with its certificate; empty: no TLS."),
                "annotations": texts("Annotations of it."),
            },
        ),
    }


def _train() -> dict[str, Schema]:
    job = table(
        "A RayJob to copy, with a cluster of its own.",
        {
            "enabled": flag("Whether there is one."),
            "maxWorkers": integer("Most workers.", 1, 1024),
            "backoffLimit": integer("How often it is tried again.", 0, 100),
            "activeDeadlineSeconds": integer("How long it may take.", 1, 31536000),
            "ttlSecondsAfterFinished": integer("How long its cluster stays.", 0, 31536000),
            "toml": text("The job's file, as of `sanderling train`.", minLength=1),
        },
    )
    properties = {
        **ray_pod("a training worker"),
        "enabled": flag("Whether there is a second cluster."),
        "workers": integer("How many workers it has.", 0, 1024),
        "kind": choice("Kind of GPU in the catalogue, or cpu.", *kinds()),
        "gpus": integer("GPUs of one worker.", 1, 16),
        "spot": flag("Whether its workers are on spot nodes."),
        "job": job,
    }
    return {"train": table("Training.", properties)}
