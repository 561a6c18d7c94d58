"""
Opens a run's report.html in a headless Chromium and uses it as a reader would.

    python .ci/check_page.py runs/pocket

The slider's numbers are compared with report.json's curve; a guess reveals a card; filters leave
the cards that fit; nothing was loaded from elsewhere; no error reached the console; at 390 pixels
nothing sticks out, all cards open. The steps are a script that is appended to a copy of the page.
"""

import json
import pathlib
import re
import subprocess
import sys
import tempfile

STEPS = """
<script>
const failures = [], errors = [];
const expect = (fact, what) => { if (!fact) failures.push(what); };
window.addEventListener("error", event => errors.push(event.message));
function set(id, value, event) {
  get(id).value = value;
  get(id).dispatchEvent(new Event(event, { bubbles: true }));
}
const shows = here => {
  const shown = [...document.querySelectorAll("#cards .card")].map(c => DATA.cards[c.id.slice(4)]);
  return shown.length === Math.min(here.length, FIRST) && shown.every(c => here.includes(c));
};
for (const point of CURVE) {
  set("threshold", point.threshold, "input");
  const shown = id => parseFloat(get(id).textContent);
  const near = (id, value, digits) => Math.abs(shown(id) - value) <= 0.51 * 10 ** -digits;
  expect(near("overall", point.overall, 3), "overall at " + point.threshold);
  expect(near("tokens", point.tokens_per_query, 1), "tokens at " + point.threshold);
  expect(near("rate", 100 * point.reason_rate, 0), "rate at " + point.threshold);
}
set("threshold", 0.5, "input");
set("threshold", 0.5, "change");
const button = document.querySelector("#cards button"), card = button.dataset.card;
expect(!get("card" + card).querySelector(".answer"), "a card is closed before a guess");
button.click();
expect(get("card" + card).querySelector(".answer"), "a guess reveals the card");
expect(get("tally").textContent.includes("Of 1 you guessed"), "the guess is counted");
for (const family of new Set(DATA.cards.map(c => c.dataset))) {
  set("family", family, "change");
  const shown = [...document.querySelectorAll("#cards .card")];
  const here = shown.filter(c => DATA.cards[c.id.slice(4)].dataset === family);
  expect(shown.length && here.length === shown.length, "filter " + family);
}
set("family", "", "change");
for (const decision of ["think", "direct"]) {
  set("decision", decision, "change");
  const here = DATA.cards.filter(c => facts(c).thinks === (decision === "think"));
  expect(shows(here), "filter " + decision);
}
set("decision", "", "change");
for (const result of ["right", "wrong"]) {
  set("result", result, "change");
  const here = DATA.cards.filter(c => facts(c).right === (result === "right"));
  expect(shows(here), "filter " + result);
}
set("result", "", "change");
const loaded = performance.getEntriesByType("resource").filter(r => !r.name.startsWith("data:"));
expect(!loaded.length, "a request left the page");
const main = document.querySelector("main");
main.style.width = "WIDTHpx";  // headless Chromium has no window below 500 pixels
get("reveal").checked = true;
drawCards();
turn();
expect(main.scrollWidth <= WIDTH + 1, "wider than WIDTH px");
document.body.innerHTML = "CHECK" + JSON.stringify(failures.concat(errors)) + "CHECK";
</script>
"""


def main(run):
    run = pathlib.Path(run)
    curve = json.dumps(json.loads((run / "report.json").read_text())["curve"])
    page = (run / "report.html").read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        copy = pathlib.Path(folder, "page.html")
        for width in (1200, 390):
            steps = STEPS.replace("CURVE", curve).replace("WIDTH", str(width))
            copy.write_text(page.replace("</body>", steps + "</body>"), "utf-8")
            flags = f"--headless=new --no-sandbox --disable-gpu --window-size={width},900"
            flags += f" --user-data-dir={folder}/{width} --enable-logging=stderr --dump-dom"
            command = ["chromium", *flags.split(), f"file://{copy}"]
            done = subprocess.run(command, capture_output=True, text=True, timeout=120)
            found = re.search(r"CHECK(\[.*\])CHECK", done.stdout)
            assert found, f"{width} px: the page's script did not end; {done.stderr[-500:]}"
            assert found[1] == "[]", f"{width} px: {found[1]}"
            console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
            assert not console, console
    print("report.html in chromium: slider, guesses and filters work at 1200 and 390 px")


if __name__ == "__main__":
    main(sys.argv[1])
