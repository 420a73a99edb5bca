"""Faults of the losses of a whole ranking: ties, padding, places and temperatures done as other tools do them."""

from fault import Fault

FILE = "src/preftune/equations/listwise.py"
TIES = "src/preftune/equations/ties.py"
CONTRACT = "tests/claims/test_listwise_losses.py -k {}"
CLAIMS = "tests/equations/test_listwise.py"

FAULTS = [
    Fault(
        "plackett_luce: responses that tie are left out",
        FILE,
        "values_G = values_G.index_add(0, group, -block)",
        "values_G = values_G + 0 * block.sum()",
        CONTRACT.format("plackett_luce"),
    ),
    Fault(
        "plackett_luce: every draw is from all responses",
        FILE,
        "masked_fill(rank[:, None, :] < rank[:, :, None], -torch.inf)",
        "masked_fill(rank[:, None, :] == 0, -torch.inf)",
        CONTRACT.format("plackett_luce"),
    ),
    Fault(
        "ties: the mean over the orders instead of their sum",
        TIES,
        "(block.sum(-1) + log_h[-1][:, 0])",
        "(block.sum(-1) + log_h[-1][:, 0] - torch.lgamma(torch.tensor(block.shape[1] + 1.0)))",
        CLAIMS,
    ),
    Fault(
        "ties: the gradient averages the orders evenly",
        TIES,
        "log_h[size - 1][:, smaller].softmax(-1)",
        "(0 * log_h[size - 1][:, smaller]).softmax(-1)",
        CONTRACT.format("plackett_luce"),
    ),
    Fault(
        "ties: summed in the precision of the model",
        TIES,
        "wide = s.cpu().double()",
        "wide = s.cpu()",
        CONTRACT.format("plackett_luce"),
    ),
    Fault(
        "ties: a tie in the last rank is an event too",
        TIES,
        " & (rank[:, None, :] > rank[:, :, None]).any(-1)",
        "",
        CLAIMS,
    ),
    Fault(
        "listwise: log-ratios of the padding are read",
        FILE,
        "return beta * lists.log_ratio.masked_fill(~lists.present, 0.0)",
        "return beta * lists.log_ratio",
        CONTRACT.format("padding"),
    ),
    Fault(
        "listwise: the padding takes a share of the soft labels",
        FILE,
        "return x_GK.masked_fill(~lists.present, -torch.inf).softmax(-1)",
        "return x_GK.masked_fill(~lists.present, 0.0).softmax(-1)",
        CONTRACT.format("infonca"),
    ),
    Fault(
        "nca_list: K counts the padding",
        FILE,
        "lists.present.sum(-1, keepdim=True)",
        "lists.rank.shape[1]",
        CONTRACT.format("nca_list"),
    ),
    Fault(
        "nca_list: the second term is summed, not averaged over K",
        FILE,
        "_uniform(lists, s_GK) * logsigmoid(-s_GK)",
        "lists.present * logsigmoid(-s_GK)",
        CONTRACT.format("nca_list"),
    ),
    Fault(
        "lipo: responses that tie in s share one place, so that a fresh policy never moves",
        FILE,
        "torch.where(beside_GKK, within_GK[:, :, None],",
        "torch.where(beside_GKK, 0 * within_GK[:, :, None],",
        CONTRACT.format("lipo"),
    ),
    Fault(
        "lipo: the discount's logarithm is to the base 2",
        FILE,
        "worth = 1 / torch.log1p(place)",
        "worth = 1 / torch.log2(1 + place)",
        CONTRACT.format("lipo"),
    ),
    Fault(
        "lipo: linear gains",
        FILE,
        "gain_GK = torch.exp2(psi_GK)",
        "gain_GK = psi_GK",
        CONTRACT.format("lipo"),
    ),
    Fault(
        "lipo: scores of any size overflow unnoticed",
        FILE,
        "if bool(wrong.any()):",
        "if False:",
        CLAIMS,
    ),
    Fault(
        "exo_list: forward instead of reverse KL",
        FILE,
        "(_softmax(_scaled(lists, beta), lists) * (log_p - log_q)).sum(-1)",
        "(_softmax(lists.score / beta_r, lists) * (log_q - log_p)).sum(-1)",
        CONTRACT.format("exo_list"),
    ),
    Fault(
        "infonca: alpha multiplies the scores",
        FILE,
        "label_GK = _softmax(lists.score / alpha, lists)\n",
        "label_GK = _softmax(lists.score * alpha, lists)\n",
        CONTRACT.format("infonca"),
    ),
    Fault(
        "infonca: the first response's score is raised by 0.01",
        FILE,
        "label_GK = _softmax(lists.score / alpha, lists)\n",
        "label_GK = _softmax((lists.score + 0.01 * (torch.arange(lists.score.shape[1]) == 0)) / alpha, lists)\n",
        CONTRACT.format("infonca"),
    ),
]
