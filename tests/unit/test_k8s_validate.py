"""`make k8s-validate` is content with the manifests, and finds mistakes that are planted into them."""

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from heliostat.errors import ConfigError
from k8s.validate import checks, commands, references, render
from k8s.validate.__main__ import variants
from k8s.validate.images import tag
from k8s.validate.manifests import Manifest, pods
from k8s.validate.schemas import Kuberay
from k8s.validate.serve_config import unknown
from tests import readme
from tests.conftest import REPOSITORY

CRDS = REPOSITORY.parent / "shared" / "kuberay"
Body = dict[str, Any]

pytestmark = pytest.mark.skipif(render.tool() is None, reason="neither kubectl nor kustomize is installed")


@pytest.fixture(scope="module")
def everything() -> list[list[Manifest]]:
    return variants()


@pytest.fixture(scope="module")
def dev() -> list[Manifest]:
    return render.installation("cpu-dev")


@pytest.fixture(scope="module")
def prod() -> list[Manifest]:
    return render.installation("gpu-prod", [*render.OPTIONS])


@pytest.fixture(scope="module")
def crds() -> Kuberay:
    if not CRDS.is_dir():
        pytest.skip("KubeRay's schemas are not beside this checkout")
    return Kuberay(CRDS)


def test_the_manifests_are_right(everything: list[list[Manifest]]) -> None:
    """Of all variants; the core kinds, the same in all, are checked by their schemas once, below."""
    external = references.external()
    for manifests in everything:
        others = [manifest for manifest in manifests if manifest.kind.startswith("Ray")]
        assert [str(found) for manifest in others for check in checks.EACH for found in check(manifest)] == []
        assert [str(found) for found in references.check(manifests, external)] == []
    assert list(references.unused([one for manifests in everything for one in manifests], external)) == []


def test_kubernetes_has_the_fields(dev: list[Manifest]) -> None:
    found = [str(problem) for problem in checks.installation(dev, references.external(), None)]
    assert found == []


def test_kuberay_has_the_fields(everything: list[list[Manifest]], crds: Kuberay) -> None:
    for manifests in everything:
        assert [str(found) for manifest in manifests for found in crds.check(manifest)] == []


def test_the_platform_is_whole(dev: list[Manifest], prod: list[Manifest]) -> None:
    kinds = {(manifest.kind, manifest.name) for manifest in dev}
    assert {("RayJob", name) for name in ("train", "tune-training", "tune-decoding")} <= kinds
    assert {("RayCluster", "interactive"), ("RayService", "heliostat"), ("Deployment", "mlflow")} <= kinds
    assert {kind for kind, _ in kinds} >= {"NetworkPolicy", "PodDisruptionBudget", "PodMonitor", "PrometheusRule"}
    (service,) = (manifest for manifest in prod if manifest.kind == "RayService")
    assert service.spec["upgradeStrategy"]["type"] == "NewClusterWithIncrementalUpgrade"
    queued = [
        manifest for manifest in prod if "kueue.x-k8s.io/queue-name" in manifest.body["metadata"].get("labels", {})
    ]
    assert {manifest.kind for manifest in queued} == {"RayCluster", "RayJob"}


def test_jobs_run_on_clusters_of_one_definition(dev: list[Manifest]) -> None:
    (cluster,) = (manifest.spec for manifest in dev if manifest.kind == "RayCluster")
    jobs = [manifest.spec["rayClusterSpec"] for manifest in dev if manifest.kind == "RayJob"]
    assert len(jobs) == 3
    assert all(job == cluster for job in jobs)


def test_dashboards_and_alerts_are_the_files(dev: list[Manifest]) -> None:
    folder = REPOSITORY / "k8s" / "dashboards"
    (dashboard,) = (m.body["data"] for m in dev if m.kind == "ConfigMap" and m.name.startswith("grafana"))
    (alerts,) = (manifest.spec for manifest in dev if manifest.kind == "PrometheusRule")
    assert dashboard == {"heliostat-serving.json": (folder / "heliostat-serving.json").read_text()}
    assert alerts == yaml.safe_load((folder / "alerts.yaml").read_text())["spec"]


def at(body: Body, path: str) -> tuple[Any, Any]:
    """What holds a value, and its key there. Parts of the path are keys, with ~ for a slash, or places in a list."""
    *above, last = [int(part) if part.isdigit() else part.replace("~", "/") for part in path.split("/")]
    node: Any = body
    for part in above:
        node = node[part]
    return node, last


def put(path: str, value: Any) -> Callable[[Body], None]:
    def change(body: Body) -> None:
        node, key = at(body, path)
        if isinstance(node, list) and key == len(node):
            node.append(value)
        else:
            node[key] = value

    return change


def drop(path: str) -> Callable[[Body], None]:
    def change(body: Body) -> None:
        node, key = at(body, path)
        del node[key]

    return change


def replace(path: str, old: str, new: str) -> Callable[[Body], None]:
    def change(body: Body) -> None:
        node, key = at(body, path)
        assert old in node[key]
        node[key] = node[key].replace(old, new)

    return change


def planted(manifests: list[Manifest], kind: str, name: str, change: Callable[[Body], None]) -> tuple[Manifest, ...]:
    """The objects, with one of them changed; that one comes first."""
    (whole,) = (manifest for manifest in manifests if (manifest.kind, manifest.name) == (kind, name))
    body = copy.deepcopy(whole.body)
    change(body)
    assert body != whole.body
    return Manifest(whole.source, body), *(manifest for manifest in manifests if manifest is not whole)


JOB = "spec/rayClusterSpec"
HEAD = "spec/rayClusterConfig/headGroupSpec/template/spec"
REDIS = "spec/rayClusterConfig/gcsFaultToleranceOptions"
WORKERS = "spec/rayClusterConfig/workerGroupSpecs/0"
POD = "spec/template/spec"
SERVE = "spec/serveConfigV2"
ENTRY = "spec/entrypoint"
EXPERIMENT = "data/experiment.yaml"

# What is changed in cpu-dev, and what is said about it. The mistakes that KubeRay's schemas find are further below.
MISTAKES: dict[str, tuple[str, str, Callable[[Body], None], str]] = {
    "typo in a field": ("Deployment", "mlflow", put(f"{POD}/containers/0/livenesProbe", {}), "livenesProbe"),
    "a kind that is gone": ("PodDisruptionBudget", "mlflow", put("apiVersion", "policy/v1beta1"), "has no PodDisru"),
    "typo in a monitor": ("PodMonitor", "ray", put("spec/podMetricEndpoints", []), "podMetricEndpoints"),
    "missing claim": ("RayJob", "train", put(f"{JOB}/headGroupSpec/template/spec/volumes/1", {"name": "data",
        "persistentVolumeClaim": {"claimName": "dta"}}), "no PersistentVolumeClaim `dta`"),
    "missing ConfigMap": ("RayCluster", "interactive", put("spec/headGroupSpec/template/spec/volumes/0/configMap/name",
        "experiments"), "no ConfigMap `experiments`"),
    "missing Secret": ("RayService", "heliostat", put(f"{HEAD}/volumes/0/secret/secretName", "keys"),
        "no Secret `keys`"),
    "missing key": ("RayService", "heliostat", put(f"{REDIS}/redisPassword/valueFrom/secretKeyRef/key", "pass"),
        "no key `pass`"),
    "missing account": ("Deployment", "mlflow", put(f"{POD}/serviceAccountName", "mlflw"), "no ServiceAccount `mlflw`"),
    "missing volume": ("StatefulSet", "redis", put(f"{POD}/containers/0/volumeMounts/0/name", "dat"),
        "no volume `dat`"),
    "selector without pods": ("NetworkPolicy", "redis", put("spec/podSelector/matchLabels/app.kubernetes.io~name", "x"),
        "chooses no pod"),
    "port without a name": ("Service", "mlflow", put("spec/ports/0/targetPort", "web"), "no port `web`"),
    "budget of KubeRay's pods": ("PodDisruptionBudget", "mlflow", put("spec/selector/matchLabels",
        {"ray.io/node-type": "worker"}), "need minAvailable"),
    "Redis that is nowhere": ("RayService", "heliostat", put(f"{REDIS}/redisAddress", "rediss:6379"),
        "no Service `rediss`"),
    "image of another Ray": ("RayJob", "train", put(f"{JOB}/headGroupSpec/template/spec/containers/0/image",
        "heliostat:0.1.0-ray2.59.0-cpu"), "this checkout makes"),
    "image without a version": ("StatefulSet", "redis", put(f"{POD}/containers/0/image", "redis"), "has no version"),
    "GPU without CUDA": ("RayService", "heliostat", put(f"{WORKERS}/template/spec/containers/0/resources/limits",
        {"memory": "1Gi", "cpu": "2", "nvidia.com/gpu": "1"}), tag("cuda")),
    "another Ray than the image's": ("RayJob", "tune-training", put(f"{JOB}/rayVersion", "2.59.0"), "constraints.txt"),
    "job's name too long": ("RayJob", "train", put("metadata/name", "t" * 48), "KubeRay allows 47"),
    "cluster's name too long": ("RayCluster", "interactive", put("metadata/name", "c" * 54), "KubeRay allows 53"),
    "name that begins with a digit": ("RayService", "heliostat", put("metadata/name", "1st"), "begin with a letter"),
    "password in plain text": ("StatefulSet", "redis", put(f"{POD}/containers/0/env/0", {"name": "REDIS_PASSWORD",
        "value": "hunter2"}), "plain text"),
    "password of Redis": ("RayService", "heliostat", put(f"{REDIS}/redisPassword", {"value": "hunter2"}), "plain text"),
    "password in a URL": ("Deployment", "mlflow", put(f"{POD}/containers/0/env/0", {"name": "MLFLOW_BACKEND_STORE_URI",
        "value": "postgresql://mlflow:hunter2@db/mlflow"}), "a URL with a password"),
    "a Secret in a file": ("Service", "mlflow", put("kind", "Secret"), "secret for all who read it"),
    "unknown key of Serve": ("RayService", "heliostat", replace(SERVE, "import_path",
        "max_ongoing: 3\n    import_path"), "Ray Serve has no `applications.max_ongoing`"),
    "unknown setting of the endpoint": ("RayService", "heliostat", replace(SERVE, "num_replicas", "replicas"),
        "args.replicas"),
    "endpoint without keys": ("RayService", "heliostat", replace(SERVE, "api_keys: /etc/heliostat/keys/keys.json",
        "insecure: true"), "need keys"),
    "keys that are not mounted": ("RayService", "heliostat", replace(SERVE, "/keys/keys.json", "/key/keys.json"),
        "nothing is mounted"),
    "endpoint on loopback": ("RayService", "heliostat", replace(SERVE, "host: 0.0.0.0", "host: 127.0.0.1"), "0.0.0.0"),
    "replicas that fit nowhere": ("RayService", "heliostat", replace(SERVE, "num_cpus: 1", "num_cpus: 3"),
        "room for 0"),
    "upgrade that cuts requests": ("RayService", "heliostat", drop("spec/rayClusterDeletionDelaySeconds"),
        "after 60 s"),
    "unguarded proxy": ("RayService", "heliostat", drop(f"{HEAD}/containers/0/env/1"), "nothing guards"),
    "wrong port": ("RayService", "heliostat", put(f"{HEAD}/containers/0/ports/3/containerPort", 8001),
        "no port `serve`"),
    "grace that is too short": ("RayService", "heliostat", put(f"{WORKERS}/template/spec/terminationGracePeriodSeconds",
        30), "preStop"),
    "more at least than at most": ("RayService", "heliostat", put(f"{WORKERS}/minReplicas", 9), "is above maxReplicas"),
    "resources twice": ("RayService", "heliostat", put("spec/rayClusterConfig/headGroupSpec/resources", {"CPU": "1"}),
        "rayStartParams too"),
    "restart under autoscaler v2": ("RayCluster", "interactive", put("spec/headGroupSpec/template/spec/restartPolicy",
        "Always"), "needs Never"),
    "suspended and kept": ("RayJob", "train", lambda body: body["spec"].update(suspend=True,
        shutdownAfterJobFinishes=False), "spec.suspend: needs shutdownAfterJobFinishes"),
    "sidecar with a submitter": ("RayJob", "train", put("spec/submissionMode", "SidecarMode"),
        "no submitterPodTemplate"),
    "unknown upgrade": ("RayService", "heliostat", put("spec/upgradeStrategy/type", "Rolling"), "is none of"),
    "upgrade without a gateway": ("RayService", "heliostat", put("spec/upgradeStrategy",
        {"type": "NewClusterWithIncrementalUpgrade", "clusterUpgradeOptions": {"stepSizePercent": 10,
        "intervalSeconds": 1}}), "gatewayClassName"),
    "root": ("RayJob", "train", put(f"{JOB}/headGroupSpec/template/spec/securityContext/runAsUser", 0), "runAsNonRoot"),
    "privileges": ("Deployment", "mlflow", drop(f"{POD}/containers/0/securityContext/allowPrivilegeEscalation"),
        "allowPrivilegeEscalation"),
    "no memory limit": ("RayJob", "train", drop(f"{JOB}/headGroupSpec/template/spec/containers/0/resources/limits"),
        "limit of memory"),
    "folder of the node": ("StatefulSet", "redis", put(f"{POD}/volumes/0", {"name": "run", "hostPath": {"path": "/"}}),
        "a folder of the node"),
    "unknown command": ("RayJob", "train", replace(ENTRY, "train", "trian"), "no command `trian`"),
    "unknown flag": ("RayJob", "tune-decoding", replace(ENTRY, "--json", "--jason"), "unrecognized arguments"),
    "unknown setting": ("RayJob", "train", replace(ENTRY, "--json", "training.learning_rat=1"), "learning_rate"),
    "missing experiment": ("RayJob", "train", replace(ENTRY, "experiment.yaml", "exp.yaml"), "has no `exp.yaml`"),
    "wrong experiment": ("ConfigMap", "experiment", replace(EXPERIMENT, "learning_rate:", "learning_rte:"),
        "learning_rte"),
    "settings that exclude each other": ("ConfigMap", "experiment", replace(EXPERIMENT, "  num_workers: 2",
        "  num_workers: 2\n  fp16: true"), "training.use_gpu"),
    "unknown key of a search": ("ConfigMap", "experiment", replace(EXPERIMENT, "training.learning_rate:",
        "training.learning_rte:"), "did you mean `training.learning_rate`"),
    "unknown override of trials": ("ConfigMap", "experiment", replace(EXPERIMENT, "overrides: {training.num_tr",
        "overrides: {training.n_tr"), "tune_training.overrides: there is no key `training.n_train_epochs`"),
    "override that trials share": ("ConfigMap", "experiment", replace(EXPERIMENT, "overrides: {",
        "overrides: {training.num_workers: 1, "), "no key `training.num_workers` that can be set here"),
    "value that cannot be trained with": ("ConfigMap", "experiment", replace(EXPERIMENT, "warmup_ratio: [0.0, 0.1]",
        "warmup_ratio: [0.0, 7]"), "tune_training.space.training.warmup_ratio: 7 does not work"),
    "distribution of another library": ("ConfigMap", "experiment", replace(EXPERIMENT, "{loguniform: [1.0e-4, 2.0e-2]}",
        "{log_uniform: [1.0e-4, 2.0e-2]}"), "found log_uniform"),
    "metric that trials do not report": ("ConfigMap", "experiment", replace(EXPERIMENT, "metric: eval_loss",
        "metric: eval_los"), "trials do not report `eval_los`"),
    "unknown key of decoding": ("ConfigMap", "experiment", replace(EXPERIMENT, "temperature: {uni",
        "temprature: {uni"), "did you mean `temperature`"),
    "value that cannot be decoded with": ("ConfigMap", "experiment", replace(EXPERIMENT, "uniform: [0.5, 1.0]",
        "uniform: [0.5, 2.0]"), "tune_decoding.space.top_p: 2.0 is not allowed"),
    "workers that fit nowhere": ("ConfigMap", "experiment", replace(EXPERIMENT, "num_workers: 2", "num_workers: 40"),
        "room for 8 at most"),
    "unknown flag of MLflow": ("Deployment", "mlflow", put(f"{POD}/containers/0/command/2", "--hosts"), "--hosts"),
    "missing module": ("Job", "example-data", put(f"{POD}/containers/0/command/2", "heliostat.quickstart.schedule"),
        "no module"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_found(mistake: str, dev: list[Manifest]) -> None:
    kind, name, change, said = MISTAKES[mistake]
    changed = planted(dev, kind, name, change)
    found = [problem for check in checks.EACH for problem in check(changed[0])]
    found += [*references.check(changed, references.external()), *commands.check(changed)]
    assert [str(problem) for problem in found if said in str(problem)], found


@pytest.mark.parametrize(
    ("kind", "name", "change", "said"),
    [
        ("RayCluster", "interactive", put("spec/workerGroupSpecs/0/minReplica", 1), "minReplica"),
        ("RayJob", "train", put(f"{JOB}/headGroupSpec/template/spec/containers/0/resorces", {}), "resorces"),
        ("RayService", "heliostat", put("spec/excludeHeadPodFromServeSvc", "yes"), "not of type 'boolean'"),
        ("RayJob", "train", drop(f"{JOB}/headGroupSpec"), "headGroupSpec"),
    ],
)
def test_mistakes_are_found_by_kuberays_schemas(
    kind: str, name: str, change: Callable[[Body], None], said: str, dev: list[Manifest], crds: Kuberay
) -> None:
    (changed, *_) = planted(dev, kind, name, change)
    found = [str(problem) for problem in crds.check(changed)]
    assert len(found) == 1
    assert said in found[0]
    assert f"{kind}/{name}" in found[0]


def test_an_entry_that_nothing_refers_to_is_told(dev: list[Manifest]) -> None:
    assert [str(found) for found in references.unused(dev, {"redis": ["password"], "rediss": ["password"]})] == [
        "k8s/external.yaml: nothing refers to the Secret `rediss`"
    ]


def test_missing_schemas_are_told_with_how_to_get_them(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="kubectl get crd"):
        Kuberay(tmp_path)


def test_an_overlay_that_does_not_render_is_told(tmp_path: Path) -> None:
    (tmp_path / "kustomization.yaml").write_text("resources: [missing.yaml]")
    with pytest.raises(ConfigError, match=r"missing\.yaml"):
        render.rendered(tmp_path, [])


def test_keys_of_serve_are_known_at_every_depth() -> None:
    config = {
        "http_options": {"hosts": 1},
        "applications": [{"deployments": [{"name": "a", "replicas": 2}], "args": {"x": 1}}],
    }
    assert list(unknown(config)) == ["http_options.hosts", "applications.deployments.replicas"]


def test_pods_of_all_kinds_are_seen(dev: list[Manifest]) -> None:
    kinds = {"Deployment": 1, "Job": 1, "RayCluster": 2, "RayJob": 3, "RayService": 2}
    found = {manifest.kind: len(list(pods(manifest))) for manifest in dev if manifest.kind in kinds}
    assert found == kinds


def test_the_guide_tells_of_every_secret_and_key() -> None:
    guide = readme.document("kubernetes.md")
    for name, keys in references.external().items():
        assert re.search(rf"secret generic {name} |`{name}`", guide), name
        assert [key for key in keys if key not in guide] == []
