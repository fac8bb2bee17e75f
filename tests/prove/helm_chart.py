"""What the chart is held to: both Helm majors, schemas, refusals, one owner of replicas, checkov.

Counted here, not only passed: how many documents were valid, wrong values refused, checks failed.
"""

import copy
import tempfile
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import kubernetes_validate

from cluster.settings import resolve
from tests.helm import checks, crd
from tests.helm.chart import (
    CHART,
    FILES,
    MAJORS,
    UNSCHEMED,
    VERSIONS,
    Body,
    Helm,
    documents,
    settings_text,
    training_job,
)
from tests.helm.live import release
from tests.helm.test_golden import weaknesses
from tests.helm.test_refusals import WRONG
from tests.helm.tools import Tools, fetch
from tests.prove.attempt import attempt
from tests.prove.row import Row

SCALED = {"front": 2, "a10g-od": 2, "a10g-spot": 5}


def rows() -> Iterator[Row]:
    """Each check with its count."""
    tools = fetch()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        helms = {major: Helm(tools, major, path) for major in MAJORS}
        rendered = {name: documents(helms[4].template(*flags)) for name, flags in FILES.items()}
        yield from attempt("lint and template", partial(rendering, helms))
        yield from attempt("valid documents", partial(validity, rendered))
        yield from attempt("KubeRay's definitions", partial(kuberay, rendered))
        yield from attempt("wrong values", partial(refusals, helms))
        yield from attempt("one settings file", partial(settings, rendered, path))
        yield from attempt("restricted pods", partial(restricted, rendered))
        for major in MAJORS:
            yield from attempt(f"Helm {major} lives", partial(life, tools, major, path))
            yield from attempt(f"Helm {major} upgrade", partial(owner, tools, major, path))
        yield from attempt("checkov", partial(linter, rendered, path))


def rendering(helms: dict[int, Helm]) -> Iterator[Row]:
    """Every file of values, oldest and newest Kubernetes, both majors."""
    done = same = 0
    for flags in FILES.values():
        for version in VERSIONS:
            made = []
            for helm in helms.values():
                helm.run("lint", "--strict", f"--kube-version={version}", str(CHART), *flags)
                made.append(documents(helm.template(f"--kube-version={version}", *flags)))
                done += 1
            same += made[0] == made[1]
    total = len(FILES) * len(VERSIONS)
    measured = f"{done} linted and rendered, {same} of {total} alike in both"
    yield Row(
        "Helm 3 and 4: lint --strict, template", f"{2 * total}, alike", measured, same == total
    )


def validity(rendered: dict[str, list[Body]]) -> Iterator[Row]:
    """Kubernetes' schemas, unknown fields refused."""
    valid, bad = 0, []
    warnings.simplefilter("ignore")
    for version in ("1.29", "1.37"):
        for name, objects in rendered.items():
            for body in [*objects, *checks.as_pods(objects)]:
                if body["kind"] in UNSCHEMED or body["apiVersion"].startswith("ray.io/"):
                    continue
                try:
                    kubernetes_validate.validate(body, version, strict=True)
                    valid += 1
                except kubernetes_validate.ValidationError as error:
                    bad.append(f"{name} {body['kind']}: {error}")
    measured = f"{valid} valid, {len(bad)} not {bad[:2] or ''}".strip()
    yield Row("kubernetes-validate --strict, 1.29 and 1.37", "all", measured, not bad and valid > 0)


def kuberay(rendered: dict[str, list[Body]]) -> Iterator[Row]:
    """KubeRay 1.7's schemas with defaults, and what its operator refuses."""
    bodies = [
        b for o in rendered.values() for b in [*o, *training_job(o)] if b["apiVersion"] == crd.RAY
    ]
    found = [problem for body in bodies for problem in crd.problems(body)]
    measured = f"{len(bodies)} objects, {len(found)} problems {found[:2] or ''}".strip()
    yield Row("KubeRay's definitions, defaults applied", "0 problems", measured, not found)


def refusals(helms: dict[int, Helm]) -> Iterator[Row]:
    """Each wrong value in both majors, in words with its name."""
    refused, silent = 0, []
    for name, (flags, words) in WRONG.items():
        for major, helm in helms.items():
            said = helm.refuse(*flags)
            refused += 1
            silent += [f"{name} ({major})"] if any(word not in said for word in words) else []
    measured = f"{refused} refused, {len(silent)} without the name {silent[:2] or ''}".strip()
    target = f"{len(WRONG) * len(helms)}, each by name"
    yield Row("wrong values", target, measured, refused == len(WRONG) * len(helms) and not silent)


def settings(rendered: dict[str, list[Body]], folder: Path) -> Iterator[Row]:
    """The TOML of each as a laptop reads it."""
    read = 0
    for objects in rendered.values():
        file = folder / "sanderling.toml"
        file.write_text(settings_text(objects))
        read += resolve(file).settings.ray.address == "auto"
    measured = f"{read} of {len(rendered)} read by cluster.settings"
    yield Row("the chart's TOML is the laptop's", "all", measured, read == len(rendered))


def restricted(rendered: dict[str, list[Body]]) -> Iterator[Row]:
    """Pod Security `restricted`, read-only roots; and the check can see."""
    from tests.helm.chart import containers, pods

    every = [each for objects in rendered.values() for each in pods(objects)]
    weak = [weakness for each in every for weakness in weaknesses(*each)]
    where, broken = copy.deepcopy(every[0])
    containers(broken)[0]["securityContext"]["privileged"] = True
    measured = f"{len(every)} pods, {len(weak)} weaknesses"
    ok = not weak and bool(weaknesses(where, broken))
    yield Row("every container restricted, read-only root", "0 weaknesses", measured, ok)


def life(tools: Tools, major: int, folder: Path) -> Iterator[Row]:
    """install, test, upgrade, rollback, uninstall against the double."""
    with release(tools, major, folder, waits=True) as live:
        done = []
        for command, *flags in (
            ("install", "--wait"),
            ("test", "--timeout=240s"),
            ("upgrade", "--set=controller.replicas=3", "--wait"),
            ("rollback", "1"),
            ("uninstall", "--wait"),
        ):
            live.do(command, *flags)
            done.append(command)
        left = live.all("ray.io", "rayservices") + live.all("apps", "deployments")
    measured = f"{', '.join(done)}; {len(left)} objects left"
    yield Row(
        f"Helm {major}: a whole life on the API double", "5 commands, 0 left", measured, not left
    )


def owner(tools: Tools, major: int, folder: Path) -> Iterator[Row]:
    """Replicas after autoscaling and five changes of the release."""
    with release(tools, major, folder) as live:
        live.do("install")
        live.scale("a10g-spot", 5, "sanderling-autoscale")
        live.scale("a10g-od", 2, "sanderling-autoscale")
        kept = 0
        for command, *flags in (
            ("upgrade",),
            ("upgrade", "--set=controller.replicas=3"),
            ("upgrade", "--set=workers.a10g.spot.max=6"),
            ("upgrade", "--set=workers.a10g.onDemand.min=2"),
            ("rollback", "1"),
        ):
            live.do(command, *flags)
            kept += live.numbers() == SCALED
    measured = f"{kept} of 5 kept 2 and 5 machines"
    yield Row(f"Helm {major}: upgrade after autoscaling", "5 of 5, none fails", measured, kept == 5)


def linter(rendered: dict[str, list[Body]], folder: Path) -> Iterator[Row]:
    """checkov in its own environment."""
    verdicts = [checks.judge(objects, folder) for objects in rendered.values()]
    passed = sum(verdict.passed for verdict in verdicts)
    failed = sorted({each for verdict in verdicts for each in verdict.unexplained})
    measured = f"{passed} passed, {len(failed)} failed {failed[:3] or ''}".strip()
    measured += f" outside {len(checks.ALLOWED)} reasons"
    ok = not failed and len(checks.ALLOWED) <= 5
    yield Row("checkov, Ray's pods included", "0 failed, <= 5 reasons", measured, ok)
