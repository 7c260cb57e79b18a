"use strict";
// What is looked at stands in the address, behind the #, which no server is ever sent: reloading
// and sharing it show the same.
const State = (() => {
  const KEYS = ["view", "prompt", "at", "target", "minus", "where", "change", "order", "steer", "start",
    "new", "temperature", "seed", "other", "otherat", "feature", "words", "sort", "only"];
  let written = "";
  let values = {};
  const watchers = [];

  const parse = () => {
    const found = new URLSearchParams(location.hash.slice(1));
    return Object.fromEntries(KEYS.filter((key) => found.has(key)).map((key) => [key, found.get(key)]));
  };
  const address = () => {
    const params = new URLSearchParams(KEYS.filter((key) => values[key]).map((key) => [key, values[key]]));
    return params.size ? "#" + params : location.pathname;
  };
  // `adopted`: the values came from the address, not from the page.
  const tell = (adopted) => watchers.forEach((watcher) => watcher(adopted));

  // Changes some values; null takes one out. `step`: the browser's Back takes it back.
  const set = (changes, step) => {
    for (const [key, value] of Object.entries(changes)) {
      if (value === null || value === undefined || value === "") delete values[key];
      else values[key] = String(value);
    }
    const next = address();
    if (next === written) return;
    written = next;
    history[step ? "pushState" : "replaceState"](null, "", next);
    if (step) tell(false);
  };
  const adopt = () => {
    values = parse();
    written = address();
    tell(true);
  };
  addEventListener("popstate", adopt);
  const whole = (key, fallback) => (/^\d{1,9}$/.test(values[key] || "") ? Number(values[key]) : fallback);
  return { set, adopt, watch: (watcher) => watchers.push(watcher), get: (key) => values[key] || "", whole };
})();
