"""Know for which metrics less is better and for which more, judged by their names.

Knows words of names, and returns nothing where a name could mean either.  Reads no file and no
value.
"""

from __future__ import annotations

import re

from polyak_cli.checkpoints.names import BETTER, split_words

#: Last words of metrics' names.  Beside those of `BETTER` they are not looked for in file names,
#: where most are ordinary words.  "score" alone says nothing: FID and Brier scores are minimised.
_LESS = BETTER["min"] | split_words(
    "losses errors nll bce ce xent logloss brier huber poisson nmse nrmse nmae smape wmape mase"
    " medae mdae absrel sqrel hter eer der mer ter wil kid fad fvd lpips niqe brisque"
    " misclassification epe ade fde mpjpe chamfer emd hausdorff hd95 ece mce bpc bpb bpd fpr fnr"
    " frr regret"
)
_MORE = (BETTER["max"] - {"score"}) | split_words(
    "accuracies prec rec auroc auprc aucroc aucpr rocauc prauc fscore fmeasure fbeta f2 jaccard"
    " tiou giou diou ciou pq ndcg mrr hit hits em sacrebleu gleu chrf rougel rougelsum meteor cider"
    " bertscore comet bleurt snr sisnr sdr sisdr pesq stoi mos dnsmos msssim pearson pearsonr"
    " spearman spearmanr kendall kendalltau corrcoef lddt tmscore tpr tnr elo reward rewards topk"
)

#: Ends of names whose last word alone says nothing, or the opposite.
_PHRASES = {
    "min": split_words(
        "cross_entropy log_cosh error_rate false_positive_rate false_negative_rate miss_rate"
        " false_acceptance_rate false_rejection_rate negative_log_likelihood edit_distance"
        " bits_per_dim bits_per_byte bits_per_char frechet_distance frechet_inception_distance"
        " kernel_inception_distance wasserstein_distance chamfer_distance hausdorff_distance"
        " hamming_distance hamming_loss"
    ),
    "max": split_words(
        "explained_variance success_rate win_rate hit_rate exact_match true_positive_rate"
        " true_negative_rate panoptic_quality structural_similarity dice_coef dice_coefficient"
        " dice_similarity_coefficient jaccard_index jaccard_coef f_score inception_score"
        " episode_return mean_return average_return"
    ),
}

#: Words after the metric that do not change which way is better.
_AFTER = split_words(
    "val valid validation eval evaluation train training test dev epoch step k l lsum macro micro"
    " weighted samples avg average mean ema raw total at"
)

#: Words that turn a metric round, or make another quantity of it.
_TURNING = split_words(
    "neg negative negated minus inverse inv reciprocal std stdev var variance gap delta diff grad"
)


def guess_mode(monitor: str) -> str | None:
    """Return whether ``min`` or ``max`` of a metric is better, None if its name does not tell.

    The end of a name decides: ``fid_score`` and ``word_error_rate`` are better when less,
    ``val_f1_score`` and ``eval_top1`` when more, and ``accuracy_drop`` is not known.
    """
    # Keras spells IoU io_u; top-1, top_5 and top@5 are accuracies unless an error is named.
    text = monitor.casefold().replace("io_u", "iou")
    text = re.sub(r"(?<![a-z])top[-_@ ]?(?:\d+|k)(?![a-z0-9])", "topk", text)
    words = re.findall(r"[a-z]+[0-9]*", text)
    phrase = "_".join(["", *words])
    for mode, known in _PHRASES.items():
        if phrase.endswith(tuple(f"_{one}" for one in known)):
            return mode
    # 1-iou is a loss, though it ends like a score.
    if _TURNING & set(words) or re.search(r"(?<![a-z0-9])1 ?- ?[a-z]", text):
        return None
    while len(words) > 1 and words[-1] in {*_AFTER, "score"}:
        words.pop()
    if len(words) > 1 and words[-1] == "topk" and _find_mode(words[-2]):
        words.pop()  # error_top5
    return _find_mode(words[-1]) if words else None


def _find_mode(word: str) -> str | None:
    """Return which way is better for one word, which may end in a number and begin with a split."""
    bare = re.sub(r"^(?:validation|valid|val|eval|training|train|test|dev|m)(?=...)", "", word)
    # Keras numbers metrics, and others write the threshold behind them: auc_1, mAP50.
    ends = {word, word.rstrip("0123456789"), bare, bare.rstrip("0123456789")}
    found = [mode for mode, known in (("min", _LESS), ("max", _MORE)) if ends & known]
    return found[0] if len(found) == 1 else None
