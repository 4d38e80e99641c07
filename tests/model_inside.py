"""Test helper: finetune_full.py with the model loaded where scripts of 2023 did it.

That is inside main_process_first(). Under ZeRO-3 all ranks load together: the first one waits for
the others, and they wait for it. After 10 seconds both ranks print where they stand, and end.
"""

import faulthandler
import sys


def main(arguments):
    import finetune_full

    parse, load_model, training = finetune_full.parse, finetune_full.load_model, []

    def parse_and_keep(argv):
        parsed = parse(argv)
        training.append(parsed[1])
        return parsed

    def load_inside(*details):
        faulthandler.dump_traceback_later(20, exit=True, file=sys.__stderr__)
        with training[0].main_process_first(desc="loading the model"):
            return load_model(*details)

    finetune_full.parse, finetune_full.load_model = parse_and_keep, load_inside
    finetune_full.main(arguments)
