// All names and messages are inserted as text, never as markup.
import { SPACE, bar, bare, counted, make, percent, printable, probability, rounded, setting, sum, unsaturated } from "/common.js";
import { draw as drawTargets, isTarget, listedTargets } from "/targets.js";

export { percent };

const MAX_FILES = 100; // at once
const AT_ONCE = 4; // requests
const GUESSES = 3;
const WIDE = matchMedia("(min-width: 48rem)");
const GONE = "The server does not answer. Is netfission serve still running?";

const $ = (id) => document.getElementById(id);
const show = (id, visible) => { $(id).hidden = !visible; };

/* ---- numbers ---- */

const megabytes = (bytes) => `${(bytes / 1e6).toFixed(1)}${SPACE}MB`;
const milliseconds = (seconds) => (seconds < 1 ? `${Math.max(1, Math.round(1000 * seconds))} ms` : `${seconds.toFixed(1)} s`);

let model = null;
let items = []; // the images chosen last: {image, name, url, answer, error, seconds, row}
let current = null; // their requests
let stream = null;

/* ---- questions and answers ---- */

async function send(files) {
  current?.abort();
  const requests = (current = new AbortController());
  for (const { url } of items) URL.revokeObjectURL(url);
  items = files.slice(0, MAX_FILES).map(([image, name]) => ({ image, name, url: URL.createObjectURL(image) }));
  const several = items.length > 1;
  show("error", false);
  show("several", several);
  if (several) list(files.length);
  else preview(items[0]);
  busy(true);
  const waiting = [...items];
  const work = async () => {
    for (let item = waiting.shift(); item && !requests.signal.aborted; item = waiting.shift()) {
      await ask(item, requests.signal);
      if (requests.signal.aborted) return; // other images were chosen
      if (several) listed(item);
    }
  };
  await Promise.all(Array.from({ length: AT_ONCE }, work));
  if (current !== requests) return;
  busy(false);
  if (several) $("summary").textContent = $("count").textContent;
  else if (items[0].error) fail(items[0].error);
  else answer(items[0]);
}

async function ask(item, signal) {
  const start = performance.now();
  try {
    if (model && item.image.size > model.max_bytes) {
      throw new Error(`the file has ${megabytes(item.image.size)}; the limit is ${megabytes(model.max_bytes)}`);
    }
    await item.image.slice(0, 1).arrayBuffer().catch(() => {
      throw new Error("it cannot be read; instead of a folder, choose the images in it");
    });
    const response = await fetch("/predict", { method: "POST", body: item.image, signal });
    const content = printable(await response.json());
    if (!response.ok) throw new Error(content.error);
    item.answer = content;
    item.seconds = (performance.now() - start) / 1000;
  } catch (error) {
    item.error = error instanceof TypeError || error instanceof SyntaxError ? GONE : `${item.name}: ${error.message}.`;
  }
}

function busy(now) {
  $("drop").classList.toggle("busy", now);
  $("result").classList.toggle("stale", now && items.length === 1);
  $("result").setAttribute("aria-busy", now);
}

function complain(message) {
  $("error").textContent = message;
  show("error", true);
}

function fail(message) {
  complain(message);
  show("result", false);
  show("several", false);
  show("empty", true);
  $("summary").textContent = "";
}

/* ---- the image ---- */

function preview(item) {
  if (item) {
    $("preview").src = item.url;
    $("preview").alt = item.name;
  }
  show("preview", Boolean(item));
  show("invitation", !item);
  show("another", Boolean(item));
  $("drop").classList.toggle("filled", Boolean(item));
}

function pixelated({ target }) {
  target.classList.toggle("tiny", target.naturalWidth < 128);
}
$("preview").addEventListener("load", pixelated);
$("preview").addEventListener("error", () => preview(null)); // the browser cannot show it

/* ---- one answer ---- */

function answer(item) {
  $("single").append($("result"));
  show("several", false);
  draw(item);
  if (isTarget(item.answer)) {
    $("summary").textContent = listedTargets(item.answer);
    return;
  }
  $("summary").textContent = [$("mark").textContent, `${$("title").textContent} ${$("share").textContent}`,
    $("guesses").textContent, agreement(item.answer)].map((part) => part.trim().replace(/\.$/, "")).filter(Boolean).join(". ");
}

function draw(item) {
  show("empty", false);
  show("result", true);
  const target = isTarget(item.answer);
  show("classified", !target);
  show("predicted", target);
  $("time").textContent = `The server took ${milliseconds(item.answer.seconds)}; with the transfer it was ${milliseconds(item.seconds)}.`;
  if (target) {
    $("predicted").replaceChildren(...drawTargets(item, model));
    return;
  }
  drawVerdict(item.answer);
  drawSet(item.answer);
  drawEnsemble(item.answer);
  $("agreement").textContent = agreement(item.answer);
  drawExits(item.answer);
  drawUncertainty(item.answer);
}

// Without a threshold, nothing is known of how often such answers are wrong.
const trust = ({ abstain }) => (abstain === undefined ? "unjudged" : abstain ? "unsure" : "confident");
const guess = (one) => `${one.class}${SPACE}(${probability(one.probability)})`;
const guesses = ({ probabilities }) => probabilities.slice(0, GUESSES).map(guess).join(", ");
const total = (answer) => answer.entropy / Math.log(Math.max(2, model.classes.length));

function drawVerdict(answer) {
  const kind = trust(answer);
  $("verdict").className = `verdict ${kind}`;
  $("mark").textContent = { confident: "Confident enough to answer", unsure: "", unjudged: "This answer cannot be judged" }[kind];
  $("title").textContent = kind === "unsure" ? "Not sure enough to answer" : answer.class;
  $("share").textContent = kind === "unsure" ? "" : probability(answer.probability);
  $("guesses").textContent = kind === "unsure" ? `Best guesses: ${guesses(answer)}` : "";
  $("reason").textContent = reason(kind, answer);
  for (const id of ["mark", "guesses"]) show(id, $(id).textContent);
}

function reason(kind, answer) {
  if (kind === "unjudged") {
    const level = total(answer) > 0.8 ? " Its uncertainty is close to guessing." : "";
    const why = model.calibrated ? "The server was started without a risk" : "The network was not calibrated";
    return `${why}, so how often it errs at this confidence is not known.${level}`;
  }
  if (model.delta !== null) return bounded();
  const images = calibrationImages();
  const effect = `the share of wrong answers within ${setting(model.risk)} on the ${images}`;
  if (model.threshold > 1) return `It abstains on every image: no threshold of confidence keeps ${effect}.`;
  return `It abstains if its confidence is below ${percent(model.threshold)}, which keeps ${effect}.`;
}

const calibrationImages = () => `${model.calibration_images.toLocaleString("en")} ${model.calibrated_on}`;
const chance = () => (model.delta === null ? "on average" : `with a probability of ${setting(1 - model.delta)}`);

function bounded() {
  const promise = `at most ${setting(model.risk)} of the answers are wrong, ${chance()}, by the ${calibrationImages()}`;
  if (model.threshold > 1) return `It abstains on every image: no threshold of confidence promises that ${promise}.`;
  if (model.threshold === 0) return `It answers every image: ${promise}.`;
  return `It abstains if its confidence at temperature 1 is below ${percent(model.threshold)}: ${promise}.`;
}

function drawSet(answer) {
  show("set", answer.set !== undefined);
  show("outside", answer.out_of_distribution);
  if (answer.out_of_distribution) {
    $("outside").textContent = `Unlike the ${calibrationImages()} (p-value ${rounded(answer.p_value, 3)}): perhaps of none of the classes. `
      + `Of images like them, at most ${setting(answer.accept_false_alarms)} are marked so, ${chance()}.`;
  }
  if (answer.set === undefined) return;
  const whose = answer.class_wise ? "the images of each class" : "the images";
  $("classes").textContent = answer.set.join(", ") || "No class is likely enough.";
  $("promise").textContent = `Such sets contain the true class of at least ${setting(answer.coverage)} of ${whose}, ${chance()}, by the ${calibrationImages()}.`;
}

const others = (listed) => model.classes.length - listed.length;
const otherName = (count) => (count === 1 ? "1 other class" : `${count} others`);

function drawEnsemble(answer) {
  const row = (name, share, ...classes) => {
    const item = make("li", undefined, ...classes);
    item.append(make("span", name, "label"), bar(share), make("span", probability(share), "number"));
    return item;
  };
  const listed = answer.probabilities;
  const rows = listed.map((one) => row(one.class, one.probability));
  if (others(listed)) rows.push(row(otherName(others(listed)), 1 - sum(listed.map((one) => one.probability)), "rest"));
  $("ensemble").replaceChildren(...rows);
}

function agreement({ exits, probabilities }) {
  if (exits.length === 1) return "This network has one exit.";
  const votes = new Map();
  exits.forEach((exit, number) => votes.set(exit.class, [...(votes.get(exit.class) ?? []), number]));
  if (votes.size === 1) return `${exits.length === 2 ? "Both" : `All ${exits.length}`} exits predict ${exits[0].class}.`;
  const sides = [...votes].sort((one, other) => other[1].length - one[1].length);
  const groups = sides.map(([name, numbers]) => {
    const isListed = probabilities.some((one) => one.class === name);
    const shares = isListed ? "" : ` (${numbers.map((number) => probability(exits[number].probability)).join(", ")})`;
    const voters = numbers.length === 1 ? `exit ${numbers[0]} predicts` : `exits ${numbers.slice(0, -1).join(", ")} and ${numbers.at(-1)} predict`;
    return `${voters} ${name}${shares}`;
  });
  return `${groups.join("; ")}.`.replace(/^e/, "E");
}

function drawExits(answer) {
  const cell = (tag, role, text) => {
    const element = make(tag, text);
    element.setAttribute("role", role); // which the narrow layout would take away
    return element;
  };
  const head = cell("tr", "row");
  head.append(cell("td", "cell"), ...answer.exits.map((_, number) => cell("th", "columnheader", `exit ${number}`)));
  const row = (name, shares, isVote, ...classes) => {
    const line = cell("tr", "row");
    line.classList.add(...classes);
    line.append(cell("th", "rowheader", name));
    shares.forEach((share, number) => {
      const data = cell("td", "cell");
      data.append(make("span", bare(unsaturated(share)), "number"), bar(share));
      if (isVote(number)) data.append(make("span", "predicted", "hidden-visually"));
      data.classList.toggle("votes", isVote(number));
      line.append(data);
    });
    return line;
  };
  const listed = answer.probabilities;
  const rows = listed.map((one, place) => row(one.class, answer.exits.map((exit) => exit.probabilities[place]),
    (number) => answer.exits[number].class === one.class));
  if (others(listed)) {
    rows.push(row(otherName(others(listed)), answer.exits.map((exit) => 1 - sum(exit.probabilities)), () => false, "rest"));
  }
  $("exits").style.setProperty("--exits", answer.exits.length);
  $("exits").replaceChildren(head, ...rows);
}

function drawUncertainty(answer) {
  const disagreement = answer.mutual_information / Math.log(Math.max(2, Math.min(answer.exits.length, model.classes.length)));
  const level = (share, levels) => levels.find(([limit]) => share <= limit)[1];
  const entry = (term, share, words, number) => {
    const group = make("div");
    const definition = make("dd");
    const line = make("div", undefined, "level");
    line.append(make("span", words), make("span", number, "quiet", "small"));
    definition.append(bar(share), line);
    group.append(make("dt", term, "quiet"), definition);
    return group;
  };
  $("uncertainty").replaceChildren(
    entry("Total", total(answer), level(total(answer), [[0.05, "very low"], [0.25, "low"], [0.5, "moderate"], [0.8, "high"], [Infinity, "close to guessing"]]),
      `entropy ${rounded(answer.entropy, 3)} nats`),
    entry("From disagreement between exits", disagreement, level(disagreement, [[0.02, "very low"], [0.1, "low"], [0.3, "moderate"], [Infinity, "high"]]),
      `mutual information ${rounded(Math.max(0, answer.mutual_information), 3)} nats`),
  );
}

/* ---- several answers ---- */

function list(chosen) {
  preview(null);
  show("empty", false);
  show("result", false);
  show("left-out", chosen > items.length);
  $("left-out").textContent = `Only the first ${items.length} of ${chosen} files are sent.`;
  $("summary").textContent = "";
  $("single").append($("result"));
  $("answers").replaceChildren(...items.map((item) => (item.row = row(item))));
  count();
}

function row(item) {
  const image = make("img", undefined, "thumbnail");
  image.alt = "";
  image.loading = "lazy";
  image.addEventListener("load", pixelated);
  image.addEventListener("error", () => image.replaceWith(make("span", undefined, "thumbnail"))); // the browser cannot show it
  image.src = item.url;
  const text = make("span", undefined, "answer");
  text.append(make("span", "…", "short"), make("span", item.name, "quiet", "small"));
  const head = make("summary");
  head.append(image, text);
  const details = make("details", undefined, "card");
  details.append(head);
  details.addEventListener("toggle", () => {
    if (details.open) open(item, details);
    else if (details.contains($("result"))) preview(null);
  });
  head.addEventListener("click", (event) => { if (!item.answer) event.preventDefault(); }); // nothing to open
  const element = make("li");
  element.append(details);
  return element;
}

function open(item, details) {
  for (const other of $("answers").querySelectorAll("details[open]")) other.open = other === details;
  details.append($("result"));
  draw(item);
  if (WIDE.matches) preview(item); // else it would move what is being read
}

const kindOf = ({ error, answer }) => (error ? "failed" : isTarget(answer) ? "predicted" : trust(answer));

function listed(item) {
  const kind = kindOf(item);
  item.row.classList.add(kind);
  item.row.querySelector(".short").textContent = {
    failed: () => item.error.replace(`${item.name}: `, ""),
    confident: () => guess(item.answer),
    unsure: () => `Not sure enough: ${guesses(item.answer)}`,
    unjudged: () => `Cannot be judged: ${guess(item.answer)}`,
    predicted: () => listedTargets(item.answer),
  }[kind]();
  count();
}

function count() {
  const done = items.filter((item) => item.answer || item.error);
  const kinds = done.map(kindOf);
  const words = { confident: "answered", unsure: "not sure enough", unjudged: "cannot be judged", predicted: "predicted", failed: "failed" };
  const parts = Object.entries(words).map(([kind, word]) => [kinds.filter((one) => one === kind).length, word]).filter(([number]) => number);
  const counts = parts.map(([number, word]) => `${number} ${word}`).join(", ");
  const waiting = items.length - done.length;
  $("count").textContent = `${items.length} images: ${[counts, waiting && `${waiting} to go`].filter(Boolean).join(", ")}`;
}

/* ---- where images come from ---- */

const named = (files) => [...files].map((file) => [file, printable(file.name)]);

$("file").addEventListener("change", () => {
  const files = named($("file").files);
  if (files.length) send(files);
  $("file").value = ""; // so that the same file can be chosen again
});
$("another").addEventListener("click", () => $("file").click());

let inside = 0;
for (const kind of ["dragenter", "dragover", "dragleave", "drop"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    inside += { dragenter: 1, dragleave: -1 }[kind] ?? 0;
    if (kind === "drop") inside = 0;
    $("drop").classList.toggle("over", inside > 0);
  });
}
document.addEventListener("drop", (event) => {
  const files = named(event.dataTransfer.files);
  if (files.length) send(files);
  else complain("Only files can be dropped here. Save the image first, then drop the file.");
});
document.addEventListener("paste", (event) => {
  const files = [...event.clipboardData.files].filter((one) => one.type.startsWith("image/"));
  if (files.length) send(files.map((file) => [file, "the pasted image"]));
});

function cameraOpen(open) {
  for (const id of ["camera", "take", "stop"]) show(id, open);
  show("drop", !open);
  show("start", !open);
  show("another", !open && !$("preview").hidden);
}

// Browsers offer the camera on this machine and over HTTPS only.
show("start", Boolean(navigator.mediaDevices?.getUserMedia));
$("start").addEventListener("click", async () => {
  try {
    stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
  } catch (error) {
    complain(error.name === "NotFoundError" ? "No camera was found." : "The camera cannot be used. Does the browser allow it?");
    return;
  }
  $("video").srcObject = stream;
  cameraOpen(true);
  await $("video").play();
  $("take").focus();
});

function cameraStop() {
  stream?.getTracks().forEach((track) => track.stop());
  $("video").srcObject = stream = null;
  cameraOpen(false);
}
$("stop").addEventListener("click", () => { cameraStop(); $("start").focus(); });
$("take").addEventListener("click", () => {
  const canvas = document.createElement("canvas");
  canvas.width = $("video").videoWidth;
  canvas.height = $("video").videoHeight;
  canvas.getContext("2d").drawImage($("video"), 0, 0);
  cameraStop();
  canvas.toBlob((image) => send([[image, "the picture"]]), "image/jpeg", 0.95);
});

/* ---- the network ---- */

function quality() {
  const images = counted(model.test_images, "test image");
  if (!("accuracy" in model)) return model.quality === null ? "not evaluated" : `${model.quality} on ${images}`;
  return model.accuracy === null ? "accuracy not known" : `${percent(model.accuracy)} of ${images} correct`;
}

try {
  model = printable(await (await fetch("/model")).json());
  const [, height, width] = model.image;
  document.documentElement.style.setProperty("--shape", width / height);
  document.title = `${model.name} – netfission`;
  $("name").textContent = model.name;
  const facts = [model.model, counted(model.exits, "exit"), counted(model.classes.length, model.targets.slice(0, -1)), quality()];
  $("about").textContent = facts.filter(Boolean).join(" · ");
  const size = `${width}${SPACE}×${SPACE}${height} pixels`;
  $("seen").textContent = model.crops ? `The network sees the centre of an image at ${size}.` : `The network sees the whole image, fitted into ${size}.`;
  if (!("accuracy" in model)) $("task").textContent = "Each exit of the network predicts for itself. Choose an image to see the combined prediction, and how sure it is.";
  show("all", model.parameters.includes("all"));
  $("curl").textContent = `curl --data-binary @image.jpg ${location.origin}/predict`;
} catch {
  fail(GONE);
}
