"""`pipo list`: the models there are."""

from __future__ import annotations

from pipo.cli.flags import JsonFlag, OutputFlags


def list_models(json: JsonFlag = False, *, output: OutputFlags) -> None:
    """Show the models in pipo's folder and in the Hugging Face cache, and those it can fetch."""
    from pipo.base.units import format_size
    from pipo.cli.terminal import print_columns, print_note, stdout, write_json
    from pipo.store import library
    from pipo.store.hub_cache import cached_repos, hub_cache_folder

    here, from_hub = library.list_models(), library.list_hub_models()
    parts = {repo.repo: repo.unfinished_bytes() for repo in cached_repos()}
    unfinished = {repo: num_bytes for repo, num_bytes in parts.items() if num_bytes}
    others = [known for known in library.KNOWN_MODELS.values() if not known.is_present]
    if json:
        models: list[dict[str, object]] = [{"name": m.name, "bytes": m.num_bytes, "path": str(m.path)} for m in here]
        models += [
            {"name": str(m.name), "bytes": m.num_bytes, "path": str(m.path)}
            | {"repo": m.name.repo, "quant": m.name.quant, "revision": m.revision}
            for m in from_hub
        ]
        fetchable = [{"name": k.name, "bytes": k.expected.num_bytes, "licence": k.licence} for k in others]
        folders = {"folder": str(library.models_folder()), "hub_folder": str(hub_cache_folder())}
        begun = [{"repo": repo, "bytes": num_bytes} for repo, num_bytes in unfinished.items()]
        write_json({**folders, "models": models, "unfinished": begun, "fetchable": fetchable})
        return
    lines = [(m.name, format_size(m.num_bytes), str(m.path)) for m in here]
    lines += [(str(m.name), format_size(m.num_bytes), str(m.path)) for m in from_hub]
    lines += [
        (repo, format_size(num_bytes), f"unfinished; pipo pull goes on, pipo rm {repo} removes it")
        for repo, num_bytes in unfinished.items()
    ]
    lines += [
        (k.name, format_size(k.expected.num_bytes), f"not here; pipo pull {k.name} ({k.licence})") for k in others
    ]
    print_columns(stdout(), ("model", "size", "where"), lines)
    if not output.quiet:
        print_note(
            "any .gguf file and any Hugging Face folder can be named by its path, too; "
            "pipo pull org/name[:quant] fetches from the hub"
        )
