"""`pipo list`: the models there are."""

from __future__ import annotations

from pipo.cli.flags import JsonFlag, OutputFlags


def list_models(json: JsonFlag = False, *, output: OutputFlags) -> None:
    """Show the models in pipo's folder, and those it can fetch."""
    from pipo.base.units import format_size
    from pipo.cli.terminal import print_columns, print_note, stdout, write_json
    from pipo.store import library

    here = library.list_models()
    others = [known for known in library.KNOWN_MODELS.values() if not known.is_present]
    if json:
        models: list[dict[str, object]] = [{"name": m.name, "bytes": m.num_bytes, "path": str(m.path)} for m in here]
        fetchable = [{"name": k.name, "bytes": k.expected.num_bytes, "licence": k.licence} for k in others]
        write_json({"folder": str(library.models_folder()), "models": models, "fetchable": fetchable})
        return
    lines = [(m.name, format_size(m.num_bytes), str(m.path)) for m in here]
    lines += [
        (k.name, format_size(k.expected.num_bytes), f"not here; pipo pull {k.name} ({k.licence})") for k in others
    ]
    print_columns(stdout(), ("model", "size", "where"), lines)
    if not output.quiet:
        print_note("any .gguf file and any Hugging Face folder can be named by its path, too")
