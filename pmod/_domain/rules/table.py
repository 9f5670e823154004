"""The table of rules, by the name that torch gives a function.

A function of torch that is written in Python and has no rule is entered: what it calls
has rules. Where both a Python function and the one that it calls have a name, a rule is
for the inner one, unless it says `outer=True`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar

T = TypeVar("T", bound=Callable[..., Any])

Function: TypeAlias = Callable[..., Any]
Rule: TypeAlias = Callable[..., Any]

RULES: dict[str, Rule] = {}
OUTER: set[str] = set()


def rule(*names: str, outer: bool = False) -> Callable[[T], T]:
    """Register a rule for the functions of these names."""

    def register(f: T) -> T:
        for name in names:
            RULES[name] = f
        if outer:
            OUTER.update(names)
        return f

    return register


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Element by element: what it makes is cut as what it takes, once that is cut alike.
POINTWISE = _words(
    """
    add sub mul div true_divide floor_divide remainder fmod pow rsub neg abs absolute
    subtract multiply divide negative float_power exp exp2 expm1 log log2 log10 log1p
    sqrt rsqrt square sin cos tan asin acos atan atan2 arcsin arccos arctan arctan2 sinh
    cosh tanh asinh acosh atanh arcsinh arccosh arctanh sigmoid logit erf erfc erfinv
    relu relu6 silu gelu elu selu celu leaky_relu hardtanh hardswish hardsigmoid
    softplus softsign mish log_sigmoid softshrink hardshrink threshold clamp clip
    clamp_min clamp_max maximum minimum fmax fmin lerp addcmul addcdiv masked_fill
    sign sgn floor ceil round trunc fix frac reciprocal eq ne lt le gt ge greater less
    greater_equal less_equal not_equal logical_and logical_or logical_not logical_xor
    bitwise_and bitwise_or bitwise_not bitwise_xor bitwise_left_shift
    bitwise_right_shift isnan isinf isfinite isposinf isneginf isreal isclose nan_to_num
    real imag conj conj_physical resolve_conj resolve_neg angle complex polar
    float double half bfloat16 int long short bool byte chalf cfloat cdouble cpu cuda
    contiguous clone detach zeros_like ones_like full_like empty_like hypot
    xlogy copysign heaviside sinc positive deg2rad rad2deg alias lgamma digamma
    polygamma nextafter ldexp logaddexp logaddexp2 special_expit special_erf
    special_gammaln special_i0 special_i1 special_xlogy special_log1p special_expm1
    special_ndtr special_sinc i0 signbit hardshrink dequantize gcd lcm
    __add__ __radd__ __sub__ __rsub__ __mul__ __rmul__ __truediv__ __rtruediv__ __div__
    __rdiv__ __floordiv__ __mod__ __pow__ __rpow__ __neg__ __pos__ __abs__ __eq__ __ne__
    __lt__ __le__ __gt__ __ge__ __and__ __or__ __xor__ __invert__ __rand__ __ror__
    __rxor__ __lshift__ __rshift__
    """
)

# They change their first tensor, element by element.
IN_PLACE = frozenset(
    [f"{name}_" for name in POINTWISE if not name.endswith("__")]
) | _words(
    """
    zero_ fill_ copy_ __iadd__ __isub__ __imul__ __itruediv__ __idiv__ __ipow__
    __ifloordiv__ __imod__ __iand__ __ior__ __ixor__
    """
)

# They draw random numbers: ranks must agree on what is one value, too.
DRAWS = _words(
    """
    dropout dropout1d dropout2d dropout3d feature_dropout alpha_dropout dropout_
    feature_alpha_dropout rand randn randint randperm normal bernoulli multinomial
    poisson binomial rand_like randn_like randint_like normal_ uniform_ bernoulli_
    random_ exponential_ cauchy_ geometric_ log_normal_ rrelu gumbel_softmax
    """
)

# They say of a block what they would say of the whole.
FREE = _words(
    """
    dim ndimension is_floating_point is_complex is_signed is_conj is_neg is_inference
    is_contiguous element_size get_device retain_grad requires_grad_ result_type
    __hash__ __repr__ is_nested is_pinned is_distributed has_names detach_ backward
    get_default_dtype is_tensor can_cast promote_types is_same_size_ is_sparse
    """
)

# The attributes of which the same holds.
FREE_ATTRIBUTES = _words(
    """
    ndim dtype device layout requires_grad grad_fn is_leaf itemsize output_nr
    retains_grad names name is_cuda is_cpu is_mps is_xpu is_meta is_sparse is_sparse_csr
    is_quantized is_nested is_mkldnn is_ipu is_vulkan is_ort is_xla is_mtia is_maia
    grad_dtype volatile _version _backward_hooks _post_accumulate_grad_hooks
    """
)
