"""What the parts of a beamline are started with, by an experiment: the service, and the rule that lets runs go."""

from flows.experiment.model import Experiment
from storage.retention import RetentionPolicy, parse_age
from streaming.service import ServiceSettings, SourceSettings

__all__ = ["retention_policy", "serve_arguments", "service_settings"]


def service_settings(experiment: Experiment) -> ServiceSettings:
    """The settings of the streaming service that takes this experiment."""
    place = experiment.deployment.service
    same = (
        "gap_timeout_s",
        "idle_timeout_s",
        "catalog_url",
        "upload_to",
        "wants_tokens",
        "encrypts",
        "allows_insecure",
    )
    return ServiceSettings(
        root=experiment.root,
        bind=place.bind or place.address,
        experiment=experiment.experiment,
        sources=tuple(
            SourceSettings(name=s.name, endpoint=s.endpoint, persistence=s.persistence) for s in experiment.data_sources
        ),
        buffer_bytes=int(place.buffer_gib * (1 << 30)),
        **{name: getattr(place, name) for name in same},
    )


def serve_arguments(experiment: Experiment) -> list[str]:
    """The same as arguments of ``nearline serve``."""
    place = experiment.deployment.service
    arguments = ["--root", str(experiment.root), "--bind", place.bind or place.address]
    arguments += ["--experiment", experiment.experiment, "--buffer", f"{place.buffer_gib:g}"]
    arguments += ["--gap-timeout", f"{place.gap_timeout_s:g}", "--idle-timeout", f"{place.idle_timeout_s:g}"]
    for source in experiment.data_sources:
        arguments += ["--source", f"{source.name}={source.endpoint}"]
        arguments += ["--online", source.name] if source.persistence == "online" else []
    options = {"--catalog": place.catalog_url, "--upload-to": place.upload_to, "--http": place.http_port}
    arguments += [str(word) for pair in options.items() if pair[1] is not None for word in pair]
    flags = {"--tokens": place.wants_tokens, "--encrypt": place.encrypts, "--insecure": place.allows_insecure}
    return arguments + [flag for flag, wanted in flags.items() if wanted]


def retention_policy(experiment: Experiment) -> RetentionPolicy | None:
    """The rule by which whole runs of the experiment may go; None where the file lets none go."""
    rule = experiment.retention
    if rule.older_than is None:
        return None
    return RetentionPolicy(
        older_than=parse_age(rule.older_than),
        keep_last=rule.keep_last,
        only_uploaded=rule.only_uploaded,
        experiment=experiment.experiment,
    )
