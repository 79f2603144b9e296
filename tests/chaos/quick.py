"""Short limits for a deployment, so that a fault takes seconds, and times that fit them."""

from tests.chaos.faults import Times
from tests.town import QUICK

LIMITS = QUICK | {"disagg__front__missing_roles__REPLACEMENT_S": 4.0}
TIMES = Times(short=0.4, router=4.0, missing=5.5, calm=(0.1, 0.4))
