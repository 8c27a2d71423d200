"""The statistics of a net and a loss, of an opened loss too."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

from fnbp.arrays.checks import describe
from fnbp.layer import Context
from fnbp.losses.loss import Loss
from fnbp.opening import Opened

Maker = TypeVar("Maker", bound=Callable[..., Any])


def opens(maker: Callable[..., Any]) -> Callable[..., Any]:
    """Have the maker of a statistic take an opened loss in the place of a net and a loss.

    The function that it then makes is (params, *batch, key=None, **more) -> what it is of (params, state, x, y, ctx):
    key is that of ctx, and the state that it returns is aux.
    """

    @functools.wraps(maker)
    def made(net: Any, *args: Any, **options: Any) -> Callable[..., Any]:
        if not isinstance(net, Opened):
            return maker(net, *args, **options)
        check_alone(name_of(maker), args, options)
        of = maker(net.net, net.mean, *args, **options)

        def of_batch(params: Any, *batch: Any, key: Any = None, **more: Any) -> Any:
            x, shared = net.given(params, batch)
            return of(params, shared, x, (), Context(key), **more)

        return of_batch

    return made


def name_of(maker: Any) -> str:
    """The name of a function."""
    return maker.__name__


def check_alone(name: str, args: tuple[Any, ...], options: dict[str, Any]) -> None:
    """TypeError if there is a Loss beside an opened loss."""
    for given in (*args[:1], *(options[key] for key in ("loss",) if key in options)):
        if given is None or isinstance(given, Loss) or "loss" in options:
            raise TypeError(f"{name}: an opened loss takes no other loss beside it, got {describe(given)}")


def of_two_batches(maker: Callable[..., Any]) -> Callable[..., Any]:
    """The same for a statistic of (params, state, (x, y), (x_query, y_query), ctx): that of an opened loss is of
    (params, batch, query, key=None), two tuples of the arguments behind params."""

    @functools.wraps(maker)
    def made(net: Any, *args: Any, **options: Any) -> Callable[..., Any]:
        if not isinstance(net, Opened):
            return maker(net, *args, **options)
        check_alone(name_of(maker), args, options)
        of = maker(net.net, net.mean, *args, **options)

        def of_pair(params: Any, batch: Any, query: Any, key: Any = None) -> Any:
            if not (isinstance(batch, tuple) and isinstance(query, tuple)):
                raise TypeError(
                    f"{name_of(maker)}: of an opened loss batch and query must be tuples of the arguments behind "
                    f"params, got {describe(batch)} and {describe(query)}"
                )
            (x, shared), (of_query, _) = net.given(params, batch), net.given(params, query)
            return of(params, shared, (x, ()), (of_query, ()), Context(key))

        return of_pair

    return made


def only_nets(maker: Maker) -> Maker:
    """Have a maker say that it needs more than a number for each example, if an opened loss comes in place of a net."""

    @functools.wraps(maker)
    def made(net: Any, *args: Any, **options: Any) -> Callable[..., Any]:
        if isinstance(net, Opened):
            raise TypeError(
                f"{name_of(maker)}: an opened loss gives one number for each example, and this needs the Hessian of "
                "the loss by the prediction: give a net and a Loss. fnbp.opened(loss, fnbp.kronecker()) gives the "
                "factors of the gradients themselves"
            )
        return maker(net, *args, **options)

    return cast(Maker, made)
