"""The full list of settings, frozen: adding or dropping one is a reviewed act in this file."""

from cluster.settings.catalog import KNOWN, accepts

KNOBS = {
    "": "model data_dir",
    "http": "host port proxy max_body_bytes drain_s api_key api_keys_file machines_key",
    "admission": "max_queued_tokens max_queued_requests",
    "ray": "address auth object_store_bytes",
    "engine": "dtype kernels device activations batch_invariant kv_dtype page_tokens kv_tokens "
    "budget_tokens max_running prefix_cache",
    "prefill": "replicas cpus memory_bytes labels threads",
    "decode": "replicas cpus memory_bytes labels threads",
    "handoff": "transport min_tokens lease_s deadline_s",
    "migrate": "pages lossy keep link_bytes_per_s",
    "controller": "period_s ping_deadline_s start_deadline_s",
    "observe": "log_format log_level otlp_endpoint",
    "autoscale": "policy history short_price over period_s call_deadline_s up_delay_s down_delay_s "
    "zero_after_s quantile filled band backlog_s kv_filled ttft_s give_up_s drain_s "
    "short_usd_per_h provider service_url "
    "service_key_file health_port",
    "autoscale.prefill": "floor cap on_demand tokens_per_s",
    "autoscale.decode": "floor cap on_demand tokens_per_s",
    "autoscale.kubernetes": "kubeconfig namespace service lease lease_s notice_s",
}


def test_knobs_are_the_reviewed_ones():
    reviewed = [
        f"{section}.{key}" if section else key
        for section, keys in KNOBS.items()
        for key in keys.split()
    ]
    assert list(KNOWN) == reviewed


def test_every_knob_is_described_and_bounded():
    for name, field in KNOWN.items():
        assert field.description and field.description.endswith("."), name
        if field.annotation in (int, float):
            assert "from" in accepts(field) or "above" in accepts(field), name
