"""The judge of the words world: Math-Verify, on what stands behind the thinking."""

from __future__ import annotations

from stableopd.judges import get_judge
from stableopd.words.tokenizer import END_THINK


def judge(completion: str, answer: str) -> bool:
    """Whether the boxed answer behind the last `</think>` equals the reference (Math-Verify).

    Math-Verify alone takes the last number of any text: a completion cut off in the middle of a re-check would
    count as right whenever its last step happens to be so, and endless re-checking would look like success.
    """
    _, ended, final = completion.rpartition(END_THINK)
    return bool(ended) and "\\boxed{" in final and get_judge("math")(final, answer)
