"""Another node of an engine: what `vllm serve --headless` runs, without vLLM's own command.

That command looks for a package by the name of vllm, which a CPU's is not.
"""

import sys

from vllm.entrypoints.cli.serve import run_headless

from sliceserve.server.vllm_compat import make_serve_parser

if __name__ == "__main__":
    parser = make_serve_parser(prog="headless_node.py", usage="", description="", epilog="")
    arguments = parser.parse_args(["--headless", "--api-server-count", "0", *sys.argv[1:]])
    run_headless(arguments)
