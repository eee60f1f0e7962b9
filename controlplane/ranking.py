"""How well services fit a description in free text: it ranks, and never decides (decision 0012).

BM25 over the word stems of what the catalogue says of each service (Robertson and Zaragoza, 2009),
by the libraries `bm25s` and `PyStemmer`, which need no model and no download.
"""

from collections.abc import Sequence
from functools import lru_cache

import bm25s
import Stemmer

from controlplane.catalogue import Catalogue, Service


class Ranking:
    """Ranks the services of one catalogue."""

    def __init__(self, catalogue: Catalogue) -> None:
        self._catalogue = catalogue
        self._stemmer = Stemmer.Stemmer("english")
        self._relevance = lru_cache(maxsize=1_024)(self._compute)

    def __call__(
        self, catalogue: Catalogue, description: str, services: Sequence[Service]
    ) -> Sequence[float]:
        """Return the relevance of each service, 0 to 1: 1 for the best, 0 for no word in common."""
        return self._relevance(description, tuple(service.aisi for service in services))

    def _compute(self, description: str, aisis: tuple[str, ...]) -> tuple[float, ...]:
        texts = [self._text(self._catalogue.service(aisi)) for aisi in aisis]
        tokens = bm25s.tokenize(
            [*texts, description], stopwords="en", stemmer=self._stemmer, show_progress=False
        )
        words = {number: word for word, number in tokens.vocab.items()}
        documents = [[words[number] for number in ids] for ids in tokens.ids]
        query = documents.pop()
        if not query or not any(documents):
            return (0.0,) * len(aisis)
        index = bm25s.BM25()
        index.index(documents, show_progress=False)
        known = [word for word in query if word in index.vocab_dict]
        if not known:
            return (0.0,) * len(aisis)
        scores = index.get_scores(known)
        best = float(scores.max())
        return tuple(max(0.0, float(score)) / best if best > 0 else 0.0 for score in scores)

    def _text(self, service: Service) -> str:
        model = self._catalogue.model_of(service)
        words = [service.aisi, service.task, service.model, service.description]
        if model is not None:
            words.append(model.description)
        return " ".join(words).replace("-", " ").replace(".", " ")
