"""Floating-point operations of a traced function, counted from its convolutions and products.

XLA's own count takes the body of a loop once, and so misses most of a convolution that runs plane by plane on CPU.
"""

import math
from typing import Any

import jax


def _of_equation(equation: Any) -> float:
    name, parameters = equation.primitive.name, equation.params
    if name == "conv_general_dilated":
        output, kernel = equation.outvars[0].aval, equation.invars[1].aval
        features = kernel.shape[parameters["dimension_numbers"].rhs_spec[0]]
        return 2.0 * math.prod(output.shape) * math.prod(kernel.shape) / features
    if name == "dot_general":
        (contracted, _), _ = parameters["dimension_numbers"]
        left, output = equation.invars[0].aval, equation.outvars[0].aval
        return 2.0 * math.prod(output.shape) * math.prod(left.shape[axis] for axis in contracted)
    if name == "scan":
        return parameters["length"] * _of_jaxpr(parameters["jaxpr"].jaxpr)
    if name == "cond":
        # The branches are forms of one computation for different platforms, or alternatives of which one runs.
        return max(_of_jaxpr(branch.jaxpr) for branch in parameters["branches"])
    if name == "while":
        return _of_jaxpr(parameters["body_jaxpr"].jaxpr)
    inner = [value for value in parameters.values() if hasattr(value, "eqns") or hasattr(value, "jaxpr")]
    return sum(_of_jaxpr(getattr(value, "jaxpr", value)) for value in inner)


def _of_jaxpr(jaxpr: Any) -> float:
    return sum(_of_equation(equation) for equation in jaxpr.eqns)


def count(function, *arguments: Any) -> float:
    """Floating-point operations (two per multiply-add) of ``function(*arguments)``; shapes suffice as arguments."""
    return _of_jaxpr(jax.make_jaxpr(function)(*arguments).jaxpr)
