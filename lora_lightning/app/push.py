"""`lora-lightning push`: an adapter and its card to the Hugging Face hub or to Weights & Biases."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_lightning.app.upload import CARD, Upload, upload_of
from lora_lightning.app.wandb_artifact import log_adapter
from lora_lightning.errors import UserError
from lora_lightning.files.hubs import huggingface, weights_and_biases
from lora_lightning.files.hubs.address import HUBS, Address, address_of
from lora_lightning.files.hubs.remote import UnreachableError
from lora_lightning.utils.tables import format_table, printable
from lora_lightning.utils.wandb_key import has_wandb_key

QUIET = {  # settings of W&B by which nothing goes beside the artifact: no code, console, machine or packages
    "silent": True, "console": "off", "disable_git": True, "disable_code": True, "disable_job_creation": True,
    "save_code": False, "x_disable_meta": True, "x_disable_stats": True, "x_disable_machine_info": True,
    "x_save_requirements": False, "program": "lora-lightning", "program_relpath": "lora-lightning",
}  # fmt: skip


def push(options: Mapping[str, Any]) -> str:
    """Upload an adapter, or show what would be uploaded.

    Args:
        options: of the command `push`, by name.

    Returns:
        What was uploaded where, in a few lines.

    Raises:
        UserError: every mistake in one message; there is no adapter, no access, no answer.
    """
    address = address_of(options["to"])
    dry = bool(options.get("dry"))
    problems = _problems(address, options, dry)
    if problems:
        raise UserError("\n".join(problems))
    with upload_of(
        options["adapter"],
        options["to"],
        with_base=bool(options.get("base")),
        license=options.get("license"),
    ) as upload:
        if upload.lacking and not dry:
            raise UserError(
                f"adapter={options['adapter']}: is of no use elsewhere: {upload.lacking}: give base=true, "
                "which takes them along."
            )
        if dry:
            card = upload.files[CARD].read_text(encoding="utf-8")
            lack = [f"It would be refused: {upload.lacking}: give base=true."] if upload.lacking else []
            text = "\n".join(
                [
                    f"This would go to {address}; nothing is uploaded.",
                    *_shown(upload.files, upload),
                    *lack,
                    "",
                    card,
                ]
            )
            return printable(text)
        try:
            send = _to_hub if address.hub == "hf" else _to_wandb
            where, files = send(address, upload, options)
        except UnreachableError as error:
            raise UserError(
                f"to={address}: {HUBS[address.hub]} cannot be reached now ({error}): try again. "
                "What was begun may be seen there."
            ) from None
        return printable("\n".join([*where, *_shown(files, upload)]))


def _problems(address: Address, options: Mapping[str, Any], dry: bool) -> list[str]:
    problems = []
    if address.fixed:
        what = "a branch" if address.hub == "hf" else "an alias, such as best: W&B numbers versions itself"
        problems.append(f"to={address}: {address.version} cannot be written: give {what}.")
    if address.hub == "wandb":
        problems += [
            f"{n}={str(options[n]).lower()}: is an option of hf:, and W&B has none such: leave it out."
            for n in ("private", "overwrite")
            if n in options
        ]
        if not dry and not has_wandb_key():
            problems.append(f"to={address}: W&B has no key here: {weights_and_biases.LOG_IN}.")
    return problems


def _shown(files: Mapping[str, Path], upload: Upload) -> list[str]:
    """The files with their sizes, and what of the configuration was shortened."""
    rows = [(name, f"{path.stat().st_size:,}") for name, path in files.items()]
    lines = [format_table(("file", "bytes"), rows)]
    if upload.changed:
        lines.append("Paths of this machine stay here; of these the last name alone goes:")
        lines += [f"  {option}={value}" for option, value in upload.changed.items()]
    return lines


def _to_hub(
    address: Address, upload: Upload, options: Mapping[str, Any]
) -> tuple[list[str], dict[str, Path]]:
    """One commit, in words, and its files; a repository that is not there is made, for oneself alone unless
    private=false."""
    hub = huggingface.client()
    within = f"{address.folder}/" if address.folder else ""
    branch = address.version or None
    files = dict(upload.files)
    with huggingface.failures(address):
        api = hub.HfApi()
        new = not api.repo_exists(address.name)
        if new:
            api.create_repo(address.name, private=bool(options.get("private", True)))
        if branch:
            api.create_branch(address.name, branch=branch, exist_ok=True)
        if (
            not new
            and not options.get("overwrite")
            and api.file_exists(address.name, within + CARD, revision=branch)
        ):
            del files[CARD]
        commit = api.create_commit(
            address.name,
            [hub.CommitOperationAdd(within + name, str(path)) for name, path in files.items()],
            commit_message="Adapter of lora_lightning",
            revision=branch,
        )
    seen = "" if not new else ", private" if options.get("private", True) else ", for everybody to see"
    lines = [f"{address}: {commit.commit_url}{' (a new repository' + seen + ')' if new else ''}"]
    if CARD not in files:
        lines.append(f"{CARD} there stays as it is; overwrite=true replaces it.")
    return lines, files


def _to_wandb(
    address: Address, upload: Upload, options: Mapping[str, Any]
) -> tuple[list[str], dict[str, Path]]:
    """A version of the artifact, logged by a run of its own that tells nothing else."""
    wandb = weights_and_biases.client()
    entity, project, name = address.name.split("/")
    settings = wandb.Settings(**{k: v for k, v in QUIET.items() if k in wandb.Settings.model_fields})
    wandb.setup(wandb.Settings(silent=True))  # or it tells where it has the key from
    with tempfile.TemporaryDirectory(prefix="lora-push-") as folder, weights_and_biases.failures(address):
        run = wandb.init(
            entity=entity, project=project, job_type="push", mode="online", dir=folder, settings=settings
        )
        try:
            logged = log_adapter(run, upload, name, [address.version] if address.version else [])
            logged.wait()
            version = logged.version
        except BaseException:
            run.finish(exit_code=1)
            raise
        run.finish()
    return [f"{address}: {version} of {weights_and_biases.page(address)}"], upload.files
