"""What stands in which table of experiments/README.md: rows, and the published figures that they show."""

from experiments.shared.shown import Row, Shown
from experiments.shared.tables_of_speed import SPEED
from experiments.shared.tables_of_statistics import STATISTICS

AGAINST = ("the same forward", "plain JAX")
NETS = (
    "784-1024-1024-10 relu, batch 512",
    "784-1024-1024-10 sigmoid, batch 512",
    "784-128-10 relu, batch 128",
    "784-128-10 sigmoid, batch 128",
)
MODELS = (
    "mlp 784-500-300-10",
    "lenet",
    "resnet(14)",
    "lstm_classifier(128)",
    "gru_classifier(128), ragged",
    "gpt, 4 of width 128, dropout",
)
COST = ("time_ratio]:.3f", "memory_ratio]:.5f", "flops_ratio]:.5f", "compile_ratio]:.2f")


SCALING = (("each", ":g"), ("compute_ms", ":.1f"), ("add_ms", ":.1f"), ("alone", ":.0%"))


def of_net(net: str, against: str) -> Row:
    """What the gradient of a net costs against one other way to compute it."""
    at = f"{{costs[{net}, against {against}]["
    time, memory, flops, compiling = (f"{at}{end}}}" for end in COST)
    quartiles = f"{at}time_quartiles][0]:.3f}}-{at}time_quartiles][1]:.3f}}"
    return Row(net, "gradient_cost/default", (against, f"{time} ({quartiles})", memory, flops, compiling))


def of_comparison(label: str, net: str) -> Row:
    """The seconds of a comparison at two levels."""
    return Row(label, "comparison_cost/default", (f"{{{net}_quick:.1f}}", f"{{{net}_full:.1f}}"))


def of_model(model: str) -> Row:
    """What a gradient of a model costs, and how far trainings part."""
    at = f"{{{model}["
    time = f"{at}time]:.2f}} ({at}time_quartiles][0]:.2f}}-{at}time_quartiles][1]:.2f}})"
    ends = ("parameters]:,}", "memory]:.3f}", "apart]:.1e}", "itself]:.1e}", "apart_64]:.1e}")
    held, *rest = (f"{at}{end}" for end in ends)
    return Row(model, "architectures/default", (held, time, *rest))


def side_by_side(label: str, run: str) -> Row:
    """A training by both gradients."""
    seconds = ("{training_seconds[manual]:.0f}", "{training_seconds[automatic]:.0f}")
    return Row(label, run, ("{test_accuracy!l:.2%}", "{apart:.1e}", *seconds))


ACCURACY = ("{test_accuracy!l:.2%}",)
VALIDATION = ("{validation[fnbp]!l:.3f}",)
BEST = ("{test_accuracy:.2%}",)
PLANTED = "{planted:,} planted; "
CAUGHT = "{equivalent} compute the same; {caught:,} of the other {wrong:,} are caught"

TABLES: dict[str, Shown] = {
    "cost of a gradient": Shown(
        ("net", "against", "time (quartiles)", "memory", "FLOPs", "compile time"),
        tuple(of_net(net, against) for net in NETS for against in AGAINST),
    ),
    "cost of what a backward shows": Shown(
        ("what is computed", "measured"),
        (
            Row(
                "the gradient and all per-example norms, over the gradient alone",
                "gradient_cost/default",
                ("{gradient_and_norms_time_ratio:.3f} the time, {gradient_and_norms_memory_ratio:.3f} the memory",),
            ),
            Row(
                "per-example norms, over vmap(jax.grad)",
                "gradient_cost/default",
                ("{norms_time_over_vmap_grad:.3f} the time; they differ by {norms_max_relative_difference:.1e}",),
            ),
            Row(
                "`trace`, if only its gradients are used, over `value_and_grad`",
                "gradient_cost/default",
                ("{trace_flops_ratio:.5f} the FLOPs, {trace_memory_ratio:.5f} the memory",),
            ),
            Row(
                "`compare` of the digits net, all probes",
                "gradient_cost/default",
                (
                    "{compare_first_seconds:.1f} s with compilation, {compare_seconds:.1f} s again: "
                    "{compare_over_gradient:,.0f} gradients",
                ),
            ),
        ),
    ),
    "worked example": Shown(
        ("the example against plain NumPy, in float64", "largest relative error"),
        (
            Row("the manual backward", "worked_example/default", ("{max_relative_error_float64:.1e}",)),
            Row("jax.grad", "worked_example/default", ("{max_relative_error_jax_grad:.1e}",)),
            Row("finite differences", "worked_example/default", ("{max_relative_error_finite_differences:.1e}",)),
        ),
    ),
    "digits": Shown(
        ("manual against jax.grad", "measured"),
        (
            Row(
                "largest relative error of a leaf, float64",
                "digits/default",
                ("{max_relative_error_float64:.1e}",),
            ),
            Row(
                "losses of 500 steps, float64, relative difference",
                "digits/default",
                ("{max_relative_loss_difference_float64:.1e}",),
            ),
            Row(
                "losses of 500 steps, float32, relative difference",
                "digits/default",
                ("{max_relative_loss_difference_float32:.1e}",),
            ),
            Row(
                "losses of all 5,340 steps, float32, relative difference",
                "digits/default",
                ("{max_relative_loss_difference_float32_all_steps:.1e}",),
            ),
            Row("test accuracy on the held-out fifth", "digits/default", ACCURACY),
            Row(
                "the same for `--seed` 0 to 9",
                "digits/ten seeds",
                ("mean {mean_test_accuracy:.2%}, least {least_test_accuracy:.2%}",),
            ),
        ),
    ),
    "architectures": Shown(
        (
            "model, float32",
            "parameters",
            "time (quartiles)",
            "memory",
            "losses apart, 200 steps",
            "jax.grad and itself",
            "float64, 50 steps",
        ),
        tuple(of_model(model) for model in MODELS),
    ),
    "compile time over depth": Shown(
        ("gradient of n blocks `transformer_block(128, 4)`", "n = 4", "n = 48"),
        tuple(
            Row(
                f"`{kind}`",
                "architectures/default",
                (f"{{compile_seconds[{kind}][4]:.2f}} s", f"{{compile_seconds[{kind}][48]:.2f}} s"),
            )
            for kind in ("repeat", "serial")
        ),
    ),
    "trainings by both gradients": Shown(
        (
            "training, MNIST, 5 epochs",
            "test accuracy",
            "losses apart, 200 steps",
            "seconds, manual",
            "seconds, jax.grad",
        ),
        (
            side_by_side("LeNet-5", "images/lenet"),
            side_by_side("LSTM of 128 units, row by row", "rows/lstm"),
        ),
    ),
    "trainings by the manual backward": Shown(
        ("training, 5 epochs", "test accuracy"),
        (
            Row("LeNet-5, MNIST", "images/lenet", ACCURACY),
            Row("LeNet-5, MNIST, seed 1", "images/lenet seed 1", ACCURACY),
            Row("LeNet-5, Fashion-MNIST", "images/lenet fashion", ACCURACY),
            Row("residual network of depth 8, MNIST", "images/resnet", ACCURACY),
            Row("LSTM of 128 units, MNIST", "rows/lstm", ACCURACY),
            Row("LSTM of 128 units, MNIST, seed 1", "rows/lstm seed 1", ACCURACY),
            Row("LSTM of 128 units, Fashion-MNIST", "rows/lstm fashion", ACCURACY),
        ),
    ),
    "without warm-up": Shown(
        ("training", "losses of manual and automatic apart, 200 steps"),
        (
            Row("LSTM, the learning rate goes up over a tenth of the steps", "rows/lstm", ("{apart:.1e}",)),
            Row("LSTM, the learning rate starts at the top", "rows/lstm no warmup", ("{apart:.1e}",)),
        ),
    ),
    "letters": Shown(
        ("loss on the last tenth of the text", "measured"),
        (
            *(Row(f"learning rate 8e-3, seed {n}", f"charlm/seed {n}", VALIDATION) for n in range(3)),
            *(Row(f"learning rate 1e-3, seed {n}", f"charlm/rate 1e-3 seed {n}", VALIDATION) for n in range(3)),
            Row("the same in PyTorch eager", "charlm/peer", ("{validation[PyTorch eager]!l:.3f}",)),
        ),
    ),
    "letters, the ninth tenth": Shown(
        ("loss on the ninth tenth, trained on the first eight", "measured"),
        tuple(
            Row(f"learning rate {rate}", f"charlm/ninth {rate}", VALIDATION)
            for rate in ("1e-3", "2e-3", "4e-3", "8e-3")
        ),
    ),
    "letters, peers": Shown(
        ("against the manual backward, in turns of 50 steps", "time", "losses apart, 200 steps"),
        (
            Row(
                "PyTorch eager, learning rate 1e-3",
                "charlm/peer",
                ("{against[PyTorch eager][time_ratio]:.2f}", "{against[PyTorch eager][apart]:.1e}"),
            ),
            Row(
                "jax.grad, learning rate 1e-3",
                "charlm/side by side",
                ("{against[jax.grad][time_ratio]:.2f}", "{against[jax.grad][apart]:.1e}"),
            ),
            Row(
                "PyTorch eager, learning rate 8e-3",
                "charlm/peer rate 8e-3",
                ("", "{against[PyTorch eager][apart]:.1e}"),
            ),
        ),
    ),
    "cost of compare": Shown(
        ("net, with its loss", "quick, s", "full, s"),
        (
            of_comparison("mlp(30, 10), 8 examples of 64 numbers", "digits"),
            of_comparison("lstm_classifier(16, 3), 4 sequences of 7 steps", "lstm"),
            of_comparison("lenet(), 4 images of 28 x 28", "lenet"),
            of_comparison("gpt of 2 layers of width 16, 2 texts of 8 tokens", "gpt"),
        ),
    ),
    "wrong backwards": Shown(
        ("question", "`compare`", "`check_grads` or `check_vjp`"),
        (
            Row(
                "mistakes planted by a machine in every backward of the library",
                "mutants/spread",
                ("{planted:,} spread over {catalogue:,}; " + CAUGHT, "{peer_caught:,} caught, {peer_rate:.1%}"),
            ),
            Row(
                "the library itself, on what those are tried on, in three dtypes",
                "mutants/spread",
                (
                    "{originals_wrong} of {originals} accused",
                    "{originals_wrong_by_peer} of {originals_in_float32} accused",
                ),
            ),
            Row(
                "the same planting, in the sources as they are now",
                "mutants/sample",
                (PLANTED + CAUGHT, "{peer_caught:,} caught, {peer_rate:.1%}"),
            ),
            Row(
                "the same planting, in gelu's tanh form and log_softmax",
                "mutants/gelu and log softmax",
                (PLANTED + CAUGHT, "{peer_caught:,} caught"),
            ),
            Row(
                "written with the comparator at hand, to get past it",
                "attacks/default",
                ("{caught} of {wrong} in {classes} classes caught; {accused} of {right} right ones beside accused", ""),
            ),
            Row(
                "the known mistakes of hand-written backwards",
                "mistakes/default",
                ("{caught} of {faults} faults caught", "{peer_caught} caught, on four of five draws"),
            ),
            Row(
                "right backwards among those",
                "mistakes/default",
                (
                    "{false_alarms} of {right_backwards} accused, {conventions_recognised} of {conventions} "
                    "conventions told from faults",
                    "fails on {peer_false_alarms} of {peer_draws} draws",
                ),
            ),
            Row(
                "random right nets, layers and functions, float32 and bfloat16",
                "false_alarms/default",
                (
                    "{accused} of {calls:,} comparisons accuse; of {leaves:,} leaves the largest z is "
                    "{largest_z:.0f}, a fault is above 64",
                    "",
                ),
            ),
            Row(
                "one mistake in a net of many layers",
                "localisation/default",
                (
                    "in {nets} nets of {fewest_layers} to {most_layers} layers the right layer is named in "
                    "{layer:.1%}, the right leaf in {leaf:.1%}, a likely mistake in {named:.1%},"
                    " and it is the right one in {mistake:.1%} of those",
                    "",
                ),
            ),
        ),
    ),
    "many devices": Shown(
        ("devices", "gradients apart", "losses apart", "parameters on a device"),
        tuple(
            Row(
                label,
                f"distributed/{run}",
                ("{gradients_apart:.1e}", "{losses_apart:.1e}", "{share_of_parameters:.3f}"),
            )
            for label, run in (
                ("8 simulated, data-parallel", "8 devices"),
                ("8 simulated, fully sharded", "fully"),
                ("8 simulated, a gpt of split matrices", "gpt split"),
                ("8 simulated, a gpt fully sharded", "gpt fully"),
                ("2 processes", "2 processes"),
                ("4 processes", "4 processes"),
            )
        ),
    ),
    "long runs": Shown(
        ("a long training", "measured"),
        (
            Row(
                "a checkpoint every 250 steps and batches from an iterator",
                "long_runs/default",
                ("{ratio:.3f} of the time without; turns {ratios[0]:.3f} to {ratios[4]:.3f}",),
            ),
            Row("memory from step 2,000 to step 10,000", "long_runs/default", ("{steps_growth:+.1f} MiB",)),
            Row("memory from fit 20 to fit 100", "long_runs/default", ("{fits_growth:+.1f} MiB",)),
            Row("arrays left on the device by 80 fits", "long_runs/default", ("{arrays_growth}",)),
            Row("from the call of a second fit to its first loss", "long_runs/default", ("{second_fit:.3f} s",)),
        ),
    ),
    "generation": Shown(
        ("256 letters, context", "without the cache / with it", "the same letters", "scores apart, float64"),
        tuple(
            Row(
                label,
                f"generation/{run}",
                (
                    f"{{{way}[ratio]:.1f}} ({{{way}[quartiles][0]:.1f}}-{{{way}[quartiles][1]:.1f}})",
                    f"{{{way}[same]}}",
                    "{scores_apart_float64:.1e}",
                ),
            )
            for label, run, way in (
                ("256 letters, the highest score", "block 256", "highest_score"),
                ("256 letters, drawn", "block 256", "drawn"),
                ("64 letters, the highest score", "default", "highest_score"),
                ("64 letters, drawn", "default", "drawn"),
            )
        ),
    ),
    "scaling": Shown(
        ("accelerators", "examples of each", "compute, ms", "add up, ms", "of the speed of one"),
        tuple(
            Row(f"{n}, {kind}", "scaling/default", tuple(f"{{{key}[{i}]{form}}}" for key, form in SCALING))
            for i, (n, kind) in enumerate(
                [(n, "8 examples each") for n in (1, 8, 256)] + [(n, "512 examples together") for n in (1, 8, 256)]
            )
        ),
    ),
    "published backwards": Shown(
        ("backwards of other people, rewritten as user code", "how many"),
        (
            Row("all", "published/default", ("{entries}",)),
            Row("clean", "published/default", ("{clean}",)),
            Row("another slope at a kink, by convention", "published/default", ("{conventions}",)),
            Row("found wanting: wrong, not finite, or less accurate", "published/default", ("{wanting}",)),
            Row("another rule, on purpose", "published/default", ("{on_purpose}",)),
        ),
    ),
    "Nielsen": Shown(
        ("network, one run for each seed", "best epoch"),
        (
            Row("784-30-10, weights of variance 1", "nielsen/hidden 30", BEST),
            Row("784-30-10, weights of variance 1 / n_in", "nielsen/hidden 30 chapter 3", BEST),
            Row("784-100-10, weights of variance 1 / n_in", "nielsen/hidden 100 chapter 3", BEST),
            Row("784-100-10, weights of variance 1", "nielsen/hidden 100", BEST),
            Row("wall time of PyTorch eager over that of fnbp", "nielsen/peer", ("{torch_over_fnbp:.1f}",)),
        ),
    ),
}
TABLES |= STATISTICS | SPEED
