"""A little English, for measuring how large activations typically are.

  The town lies on both banks of the river, and its oldest bridge was built in 1347 by order of
  the bishop. "Do you remember," she asked, "what it looked like before the war?" He shook his
  head. In 2019 about 12,400 people lived there; most of them work in the harbour, at the
  university or in one of the two hospitals.

By that weights are stored in int8, see `gemma_nb.cpu.quantise.quantise`.  What the text says hardly
matters: other texts, in other languages too, give the same within what they differ by anyway; but
it is a text.
"""

# Token ids of that in the vocabulary of Gemma 3, <bos> first.  In another they are some tokens.
_IDS = """
2 818 5148 12828 580 1800 11196 529 506 8858 236764 532 1061 24625 11825 691 5284 528 236743
236770 236800 236812 236832 684 1900 529 506 54721 236761 623 6294 611 5630 2098 1304 4733 236764
623 14070 625 6976 1133 1680 506 3653 7462 1293 42058 914 2228 236761 799 236743 236778 236771
236770 236819 1003 236743 236770 236778 236764 236812 236771 236771 1331 11742 993 236793 1346 529
1091 981 528 506 53676 236764 657 506 10467 653 528 886 529 506 1156 20990 236761
"""

SAMPLE = tuple(map(int, _IDS.split()))
