"use strict";
{
  const { cards: facts } = JSON.parse(document.getElementById("report").textContent);
  const cards = [...document.querySelectorAll("#cards > li")];
  const form = document.getElementById("filters");
  const [suite, kind, search] = ["suite", "kind", "search"].map((id) => document.getElementById(id));
  const count = document.getElementById("count");
  const none = document.getElementById("none");
  // Not the verdict: who looks for "right" means the word in a question.
  const searched = ".question, dd, .where, .id";
  const words = cards.map((card) =>
    [...card.querySelectorAll(searched)].map((e) => e.textContent).join(" ").toLowerCase().replace(/\s+/g, " "),
  );
  const written = (n) => n.toLocaleString("en");

  for (const image of document.querySelectorAll("img[data-same]")) {
    image.src = document.getElementById(image.dataset.same).src;
  }

  const fill = (select, at, fitting) => {
    const chosen = select.value;
    const seen = new Map();
    for (const fact of facts) if (fitting(fact)) seen.set(fact[at], (seen.get(fact[at]) ?? 0) + 1);
    select.length = 1;
    for (const [name, n] of seen) select.add(new Option(`${name} (${n})`, name));
    select.value = seen.has(chosen) ? chosen : "";
  };

  const show = () => {
    const verdict = form.elements.verdict.value;
    const wanted = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const seen = { "": 0 };
    let shown = 0;
    facts.forEach(([itsSuite, itsKind, itsVerdict], at) => {
      const fits =
        (suite.selectedIndex < 1 || itsSuite === suite.value) &&
        (kind.selectedIndex < 1 || itsKind === kind.value) &&
        wanted.every((word) => words[at].includes(word));
      seen[""] += fits;
      seen[itsVerdict] = (seen[itsVerdict] ?? 0) + fits;
      cards[at].hidden = !fits || (verdict !== "" && itsVerdict !== verdict);
      shown += !cards[at].hidden;
    });
    for (const radio of form.elements.verdict) {
      radio.parentElement.querySelector("small").textContent = written(seen[radio.value] ?? 0);
    }
    count.value = `${written(shown)} of ${written(cards.length)} shown`;
    none.hidden = shown > 0;
  };

  const kindsOfSuite = () => fill(kind, 1, (fact) => suite.selectedIndex < 1 || fact[0] === suite.value);

  if (form) {
    fill(suite, 0, () => true);
    kindsOfSuite();
    suite.addEventListener("change", kindsOfSuite);
    form.addEventListener("input", show);
    form.addEventListener("change", show);
    form.addEventListener("submit", (event) => event.preventDefault());
    form.addEventListener("reset", () => setTimeout(() => (kindsOfSuite(), show())));
    form.hidden = false;
    show();
  }
}
