"use strict";
// The feature browser, searched by the server.
(() => {
  const { at, get, complain, whenOpened, isOpen, typing } = Bench;
  const PAGE = 12;
  let shown = 0;
  let abort = new AbortController();

  const load = async (start) => {
    abort.abort();
    abort = new AbortController();
    const query = new URLSearchParams({
      words: at("search").value, sort: at("sort").value, only: at("only").value, start, count: PAGE,
    });
    try {
      const found = await get("/api/features?" + query, abort.signal);
      const cards = found.cards.map(Cards.card);
      if (start) at("cards").append(...cards);
      else at("cards").replaceChildren(...cards);
      shown = start + cards.length;
      at("count").textContent = found.found + " of " + found.all + " features";
      at("more").hidden = shown >= found.found;
    } catch (error) { complain(error); }
  };
  let waiting = 0;
  at("search").addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(() => load(0), 150);
  });
  at("sort").addEventListener("change", () => load(0));
  at("only").addEventListener("change", () => load(0));
  at("more").addEventListener("click", () => load(shown));
  whenOpened("features", () => { if (!shown) load(0); });
  document.addEventListener("keydown", (event) => {
    if (event.key === "/" && isOpen("features") && !typing()) {
      event.preventDefault();
      at("search").focus();
    }
  });
})();
