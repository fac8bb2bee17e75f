"""IAM in small: whether a policy allows what a call does, resource by resource and with conditions.

Knows Allow, Action and Resource with *, and the conditions StringEquals and StringLike; what a
policy says beyond that is refused here rather than taken for granted.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from tests.aws_double.requests import Call

Tags = Mapping[str, str]
MADE_BY_A_LAUNCH = ("image", "subnet", "launch-template", "security-group", "network-interface")


@dataclass(frozen=True)
class Act:
    """One action on one resource. context: condition keys and their values."""

    action: str
    resource: str
    context: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Policy:
    """document: as written. used: actions, as the document spells them, that something needed."""

    document: Mapping[str, Any]
    used: set[str] = field(default_factory=set)

    @property
    def actions(self) -> set[str]:
        return {name for one in self.document["Statement"] for name in _list(one["Action"])}

    def allows(self, act: Act) -> bool:
        found = False
        for statement in self.document["Statement"]:
            named = [a for a in _list(statement["Action"]) if fnmatchcase(act.action, a)]
            if named and _applies(statement, act):
                self.used |= set(named)
                found = True
        return found


def acts(call: Call, tags_of: Mapping[str, Tags]) -> list[Act]:
    """What a call does. tags_of: of each instance that exists."""
    operation = call.operation.removesuffix("Batch")  # SQS: one permission for both
    if call.action == "ec2:CreateFleet":
        return _launch(call)
    if call.action in ("ec2:TerminateInstances", "ec2:CreateTags"):
        names = call.listed("InstanceId") or call.listed("ResourceId")
        return [Act(call.action, _arn(name), _tagged(tags_of.get(name, {}))) for name in names]
    if call.service == "sqs":
        queue = str(call.params["QueueUrl"]).rpartition("/")[2]
        return [Act(f"sqs:{operation}", f"arn:aws:sqs:us-east-1:123456789012:{queue}")]
    return [Act(f"{call.service}:{operation}", "*")]


def _launch(call: Call) -> list[Act]:
    tags = {t["Key"]: t["Value"] for t in call.structures("TagSpecification.1.Tag")}
    asked = {f"aws:RequestTag/{key}": value for key, value in tags.items()}
    made = [
        Act("ec2:RunInstances", f"arn:aws:ec2:us-east-1::{each}/x") for each in MADE_BY_A_LAUNCH
    ]
    return [
        Act("ec2:CreateFleet", "arn:aws:ec2:us-east-1:123456789012:fleet/x"),
        Act("ec2:RunInstances", _arn("new"), asked),
        *made,
        Act("ec2:CreateTags", _arn("new"), {**asked, "ec2:CreateAction": "CreateFleet"}),
        Act(
            "iam:PassRole",
            "arn:aws:iam::123456789012:role/sanderling-machine",
            {"iam:PassedToService": "ec2.amazonaws.com"},
        ),
    ]


def _arn(instance: str) -> str:
    return f"arn:aws:ec2:us-east-1:123456789012:instance/{instance}"


def _tagged(tags: Tags) -> dict[str, str]:
    return {f"aws:ResourceTag/{key}": value for key, value in tags.items()}


def _applies(statement: Mapping[str, Any], act: Act) -> bool:
    assert statement["Effect"] == "Allow" and statement.keys() <= {
        *("Sid", "Effect", "Action", "Resource", "Condition")
    }
    if not any(fnmatchcase(act.resource, each) for each in _list(statement["Resource"])):
        return False
    for operator, wanted in statement.get("Condition", {}).items():
        assert operator in ("StringEquals", "StringLike"), operator
        for key, values in wanted.items():
            told = act.context.get(key)
            if told is None or not any(_matches(operator, told, one) for one in _list(values)):
                return False
    return True


def _matches(operator: str, told: str, wanted: str) -> bool:
    return fnmatchcase(told, wanted) if operator == "StringLike" else told == wanted


def _list(value: str | Iterable[str]) -> list[str]:
    return [value] if isinstance(value, str) else list(value)
