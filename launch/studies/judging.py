"""From ``runs=FOLDER`` to a study's report: every claim with its controls and a verdict."""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pandas as pd
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from analysis.claims.claim import Claim, make_claims, read_claims
from analysis.claims.evidence import Arms, judge_all
from analysis.claims.plan import POWER, plan_table
from analysis.claims.readings import arms_of, stored_states
from analysis.claims.section import claims_section, write_claims
from analysis.claims.verdict import Verdict
from analysis.contract import Analysis, Asking
from analysis.controls.c02_vectors_of_arms import vector_table, vectors_section
from analysis.open.checkpoints import Checkpoints, HeldOutPairs, checkpoints_of_run
from analysis.open.observed import Observed
from analysis.open.runs import Run
from analysis.open.studies import DPO, Study, open_study
from analysis.open.subject import Subject
from analysis.registry import ANALYSES
from analysis.report.page import Section, write_report
from analysis.report.samples import Samples
from launch.analyses import give_corpus, refuse_unused_of_study, was_set
from launch.configuration import CONF
from launch.loggers.wandb_report import upload_study
from launch.processes.run_lock import check_writable
from launch.screen import FittingTable, console
from launch.studies.matching import is_matched
from tiltmeter.commands import command
from tiltmeter.errors import UserError
from tiltmeter.files import write_text

ALONE = "one run has no other arms and seeds; train.py --multirun study=dsteer trains them"
"""Reason why nothing is judged of a single run."""


def analyze_study(config: DictConfig) -> Path:
    """Judge every claim of a study and write its report; returns the page.

    Raises:
        UserError: no study, no dpo run in it, or wrong claims.
        FailedWrite: a full disk ….
    """
    _check_options(config)
    give_corpus(config)
    claims, study, screen = claims_of(config), open_study(Path(config.runs)), console()
    check_writable(study.report, key="runs")
    for line in study.left_out:
        screen.print(f"Left out: {line}", soft_wrap=True, markup=False)
    arms = _arms(config, study)
    verdicts = judge_all(claims, arms)
    plan = plan_table(verdicts, arms)
    section = claims_section(verdicts, plan, left_out=study.left_out, unfair=_unfair(study))
    sections = [section, *_vectors(study, arms)]
    subject = _subject(study, arms, str(config.claims_file or "as shipped, in conf/claims"))
    page = write_report(subject, sections, Samples([], "A study has none of its own."))
    write_claims(study.report, verdicts)
    screen.print(_verdicts_on_screen(sections[0], study))
    if config.upload:
        screen.print(upload_study(study, page, sections), soft_wrap=True)
    if config.plan:
        screen.print(_plan_on_screen(plan))
    return page


def _check_options(config: DictConfig) -> None:
    """Refuse what would have no effect on a study, or only with something else. Raises UserError."""
    refuse_unused_of_study()
    if config.get("data") is None and was_set("pairs"):
        raise UserError("pairs: has no effect without another corpus to draw them from; add data=…")
    if not config.ask_models and config.get("data") is not None:
        raise UserError(
            "data: another corpus is read by the models, which ask_models=false leaves closed; leave one out"
        )


def claims_of(config: DictConfig) -> list[Claim]:
    """Claims that are asked about. Raises UserError: they are wrong."""
    known = sorted(path.stem for path in (CONF / "arm").glob("*.yaml"))
    if config.claims_file is not None and was_set("claims"):
        raise UserError("claims: has no effect beside claims_file, which brings its own; leave one of the two out")
    if config.claims_file is not None:
        return read_claims(Path(config.claims_file), arms=known)
    return make_claims(OmegaConf.to_container(config.claims), where="claims", arms=known)


def verdicts_of_run(claims: Sequence[Claim], run: Run) -> list[Verdict]:
    """Verdicts on one dpo run, of the states that it stored: T where it is known, and always inconclusive; none without states.

    Raises:
        UserError: its states are damaged.
    """
    read = stored_states(run) if run.setting("arm") == DPO and claims else None
    if read is None:
        return []
    arms = Arms({DPO: [read]}, tables=lambda arm, asked: ALONE, losses=lambda arm: ALONE)
    return [replace(verdict, sentence=f"Not judged: {ALONE}.") for verdict in judge_all(claims, arms)]


def _arms(config: DictConfig, study: Study) -> Arms:
    """Everything that claims are judged by, read with a line on what is read now."""
    with console().status("Reading hidden states …") as status:
        return arms_of(
            study,
            say=lambda what: status.update(f"Asking: {what} …"),
            open_run=partial(_open, config) if config.ask_models else None,
            of_other=None if config.get("data") is None else partial(_on_other_corpus, config),
            make_table=_Tables(config) if config.ask_models else None,
        )


def _vectors(study: Study, arms: Arms) -> list[Section]:
    """The section on v* of all runs, where there are two."""
    trained = {arm: ones for arm, ones in arms.reads.items() if arm in study.runs}
    if sum(map(len, trained.values())) < 2:
        return []
    return [vectors_section(vector_table(trained))]


def _unfair(study: Study) -> list[str]:
    """A line on each SFT run that went less far from the base than dpo, or further."""
    lines = [
        f"A fair match in {arm}: its KL from the base is {own:.3g} of dpo’s {target:.3g} nats a token, the nearest that a learning "
        "rate gave."
        for arm, found in study.kl.items()
        for own, target in found
        if not is_matched(own, target)
    ]
    if "sft_chosen" in study.runs and "sft_chosen" not in study.kl:
        lines.append("A fair match in sft_chosen: its learning rate was not set by its KL from the base.")
    return lines


def _verdicts_on_screen(section: Section, study: Study) -> FittingTable:
    table = FittingTable("claim", "T (95 %)", "threshold", "verdict", title=f"Claims, {study.folder.name}")
    for _, row in section.shown.iterrows() if section.shown is not None else ():
        table.add_row(row["claim"], row["T (95 %)"], row["threshold"], row["verdict"])
    return table


def _plan_on_screen(plan: pd.DataFrame) -> FittingTable:
    """Seeds and prompts that each comparison needs."""
    table = FittingTable("claim", "against", "effect", "seeds", "prompts", title=f"For a power of {POWER:.0%}")
    for _, row in plan.iterrows():
        counts = [
            "not known" if x != x else "no number" if x == math.inf else f"{x:.0f}"
            for x in (row["seeds"], row["prompts"])
        ]
        table.add_row(row["claim"], row["against"], f"{row['effect']:.3g}", *counts)
    return table


def _open(config: DictConfig, run: Run) -> Checkpoints:
    """Both models of a run, with its probe's pairs."""
    return checkpoints_of_run(
        run, dtype=config.dtype, device=config.device, attn_implementation=config.attn_implementation
    )


def _on_other_corpus(config: DictConfig, run: Run, opened: Checkpoints) -> Checkpoints:
    """A run's models with pairs of another corpus, written as its own unless ``pairs`` says otherwise."""
    own = {"text_format": run.setting("datamodule.text_format"), "chat_date": run.setting("chat_date")}
    given = {key: value for key, value in own.items() if value is not None and not was_set(f"pairs.{key}")}
    pairs: HeldOutPairs = instantiate(config.pairs, **given)
    return pairs.of_models(opened, instantiate(config.data))


class _Tables:
    """Makes what a claim's table says, of a run's models or of its stored states, in the run's report; else it is missing.

    What is asked of the base alone, which all runs have in common, is asked once.
    """

    def __init__(self, config: DictConfig) -> None:
        self._config = config
        self._of_base: dict[str, Section | None] = {}

    def __call__(self, run: Run, name: str) -> None:
        """Write a table into a run's report."""
        analysis = next((a for a in ANALYSES if a.name == name and a.needs.what != "run"), None)
        if analysis is None:
            return
        tables = run.report / "tables"
        section = self._of_base[name] if name in self._of_base else self._ask(analysis, run, tables)
        if section is None:
            return
        for stem, table in {name: section.table, **section.more_tables}.items():
            write_text(tables / f"{stem}.csv", table.to_csv(index=False, lineterminator="\n"))

    def _ask(self, analysis: Analysis, run: Run, tables: Path) -> Section | None:
        """The section that a run's stored states or its models give."""
        console().print(f"{run.folder.name}: {analysis.name} …", soft_wrap=True, markup=False)
        question = instantiate(self._config[analysis.node]) if analysis.node else None
        try:
            section = analysis.answer(self._given(analysis, question, run, tables))
        except UserError as error:
            console().print(f"{run.folder.name}: no {analysis.name}: {error}", soft_wrap=True, markup=False)
            return None
        if getattr(question, "asks_base_alone", False):
            self._of_base[analysis.name] = section
        return section

    def _given(self, analysis: Analysis, question: object, run: Run, tables: Path) -> Observed | Asking:
        """Open what an analysis of a run asks: its stored states, or its models."""
        if analysis.needs.what == "states":
            return Observed.stored(run.folder, run.metrics)
        asking = Asking(question, _open(self._config, run), tables, takes_old=True)
        analysis.start(asking)
        return asking


def _subject(study: Study, arms: Arms, claims: str) -> Subject:
    first = study.runs["dpo"][0]
    trained = [f"{arm} × {len(runs)}" for arm, runs in study.runs.items()]
    how_far = [f"{arm} {sum(kl) / len(kl):.3g}" for arm, kl in arms.kl.items()]
    ratio = arms.noise_ratio
    matched = ", ".join(f"{arm} {own:.3g} (dpo {target:.3g})" for arm, ones in study.kl.items() for own, target in ones)
    missing = [arm for arm, n in study.planned.items() if len(study.runs.get(arm, ())) < n]
    facts = [
        ("Experiment", study.name),
        ("Arms", ", ".join([*trained, f"random weights × {study.n_draws} of each form"])),
        ("Not complete", ", ".join(missing) or "nothing is missing of what was planned"),
        ("Training", f"{first.n_steps} optimizer steps each"),
        ("Update over noise floor", f"{ratio:.3g}" if ratio == ratio else "not measured"),
        ("KL from the base, nats a token", ", ".join(how_far) or "not measured"),
        *([("Matched in KL, held-out pairs", matched)] if matched else []),
        ("Claims", claims),
        ("Study folder", str(study.folder)),
    ]
    return Subject(
        "report of a study",
        f"{study.name}: {sum(len(runs) for runs in study.runs.values())} runs of {len(study.runs)} arms",
        facts,
        "of the runs beside the study’s folder: states that they stored, and of their models read now.",
        study.report,
        lambda name: command("analyze.py", runs=study.folder),
    )
