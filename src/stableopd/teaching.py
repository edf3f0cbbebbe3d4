"""Loads and checks the teachers of a run, near and far, and makes one `Teacher` of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from stableopd.config import StableOPDConfig, TeacherConfig
from stableopd.errors import ConfigError, ModelError
from stableopd.heads import Head
from stableopd.models import context_length, load_model, load_model_config, load_tokenizer
from stableopd.preparation import check_model
from stableopd.protocols import Teacher
from stableopd.scoring import Autocast
from stableopd.teachers.local import LocalTeacher
from stableopd.teachers.router import TeacherRouter
from stableopd.vocabulary import check_same_vocabulary, vocab_size

if TYPE_CHECKING:
    from stableopd.teachers.server import ServerTeacher


def servers_of(config: StableOPDConfig, tokenizer: PreTrainedTokenizerBase) -> dict[str, ServerTeacher]:
    """The teachers that live elsewhere, asked whether they fit this run. Cheap; nothing is loaded.

    Raises: ConfigError, ModelError or TeacherError when a server cannot be this run's teacher or does not answer.
    """
    servers: dict[str, ServerTeacher] = {}
    if not config.objective.needs_teacher or not any(one.is_remote for one in config.named_teachers.values()):
        return servers
    from stableopd.teachers.server import ServerTeacher

    for name, settings in config.named_teachers.items():
        if not settings.is_remote:
            continue
        role = role_of(config, name)
        if config.objective.distill.needs_states:
            raise ConfigError(
                f"{role}.server_url: a server gives log-probabilities of tokens, and objective.distill.divergence="
                f"{config.objective.distill.divergence} needs the whole distribution; set "
                "divergence=sampled_reverse_kl or support=teacher_topk, or load the teacher here (model_name_or_path)"
            )
        server = ServerTeacher(settings, vocab_size=vocab_size(tokenizer))
        server.check(temperature=config.rollout.temperature, topk=topk_of(config))
        if not server.check_tokens(tokenizer) and settings.model_name_or_path is not None:
            check_same_vocabulary(tokenizer, load_tokenizer(settings, role))
        servers[name] = server
    return servers


def local_models(
    config: StableOPDConfig, given: str | nn.Module | None, tokenizer: PreTrainedTokenizerBase
) -> dict[str, nn.Module]:
    """The teachers of this process, loaded and checked against the student's tokenizer.

    Raises: ModelError or ConfigError as the loading and checking functions.
    """
    if not config.objective.needs_teacher:
        return {}
    if isinstance(given, nn.Module):
        if config.teachers:
            raise ConfigError("teacher_model and teachers are both given; give one of them")
        check_model("teacher", given, tokenizer, config)
        return {"teacher": given}
    models: dict[str, nn.Module] = {}
    for name, settings in config.named_teachers.items():
        if settings.is_remote:
            continue
        role = role_of(config, name)
        check_same_vocabulary(tokenizer, load_tokenizer(settings, role))
        models[name] = load_model(settings, role)
        check_model(role, models[name], tokenizer, config)
    return models


def put_to_work(
    config: StableOPDConfig,
    models: Mapping[str, nn.Module],
    servers: Mapping[str, ServerTeacher],
    *,
    device: torch.device,
    vocab_size: int,
    autocast: Autocast,
) -> tuple[Teacher | None, Head | None]:
    """One teacher made of all, and the head of the only local one (which losses over the vocabulary project)."""
    teachers: dict[str, Teacher] = dict(servers)
    head: Head | None = None
    for name, model in models.items():
        settings = config.named_teachers.get(name, TeacherConfig())
        local = LocalTeacher(
            model if settings.offload or is_placed(settings) else model.to(device),
            model_id=str(settings.model_name_or_path or name),
            vocab_size=vocab_size,
            token_budget=config.optimizer.micro_batch_tokens,
            autocast=autocast,
            offload_from=device if settings.offload else None,
        )
        teachers[name], head = local, local.head
    if not teachers:
        return None, None
    if not config.teachers:
        return next(iter(teachers.values())), head
    ordered = {name: teachers[name] for name in config.teachers}
    if config.data.teacher_column:
        return TeacherRouter(ordered), None
    return next(iter(ordered.values())), head


def teachers_context(
    config: StableOPDConfig, given: str | nn.Module | None, servers: Mapping[str, ServerTeacher]
) -> int | None:
    """Most tokens that every teacher reads, told before any weights are loaded; None when it is not known."""
    if not config.objective.needs_teacher:
        return None
    if isinstance(given, nn.Module):
        return context_length(given.config)
    lengths = [server.context_length for server in servers.values()]
    for name, settings in config.named_teachers.items():
        if not settings.is_remote:
            lengths.append(_context_of(settings, role_of(config, name)))
    known = [length for length in lengths if length is not None]
    return min(known) if known else None


def _context_of(settings: TeacherConfig, role: str) -> int | None:
    try:
        return context_length(load_model_config(settings, role))
    except ModelError:  # adapters have no configuration of their own; what cannot be loaded at all is told later
        return None


def topk_of(config: StableOPDConfig) -> int:
    """How many of the likeliest tokens a teacher is asked for at each position; 0: none."""
    distill = config.objective.distill
    return distill.topk if distill.needs_topk else config.health.overlap_topk


def role_of(config: StableOPDConfig, name: str) -> str:
    """What messages call a teacher: its place in the configuration."""
    return f"teachers.{name}" if config.teachers else "teacher"


def is_placed(settings: TeacherConfig) -> bool:
    """Whether transformers has put the model where it belongs."""
    return settings.device_map is not None or settings.quantization is not None
