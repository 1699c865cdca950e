"""What a step sends: the exchanges of the process group and their bytes, counted on two ranks."""

import argparse

from dist_vlcl.bench.ranks import launch
from dist_vlcl.bench.result import Result, Table
from dist_vlcl.bench.setup import add_orders, add_workload, device_of, settings_of, workload_of

EXAMPLES = """examples:
  python -m dist_vlcl.bench wire                             the small CLIP on two CPU ranks; bytes scale with its parameters
  python -m dist_vlcl.bench wire --model vit_b16 --images 4 --orders dual_all,dual_hop_odd"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_workload(parser, model="small", images=16, classes=4, zo="mozo")
    add_orders(parser, "first,dual_all,dual_hop_odd,language_all")
    parser.add_argument("--processes", type=int, default=2, help="ranks (default: %(default)s)")


def run(args: argparse.Namespace) -> Result:
    rows, records = [], []
    for orders in settings_of(args):
        answer = launch(args.processes, workload_of(args, orders=orders), device_of(args), steps=1)
        sent = {"scalars": 0, "gradients": 0}
        for name, size in answer["exchanges"]:
            sent["gradients" if name.startswith("allreduce") else "scalars"] += size
        rows.append([orders, len(answer["exchanges"]), sent["scalars"], sent["gradients"], 4 * answer["first_order_parameters"]])
        records.append({"orders": orders, **answer})
    columns = ["orders", "exchanges a step", "bytes of losses", "bytes of gradients", "first-order parameters, bytes"]
    note = "Bytes are those that a rank hands over. DDP's own all-reduces carry the gradients and a few bytes that say which are used."
    return Result([Table(f"What a rank sends a step: {args.model}, {args.zo}, {args.processes} ranks", columns, rows)], records, [note])
