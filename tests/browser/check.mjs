// Opens pages in headless Chromium, each in light and dark and at the widths of a desk and of a phone, and prints one
// JSON object per page and setting: what the page asked for elsewhere, what went wrong, how far it is too wide, and
// what axe finds (contrast, texts for pictures, names of links and fields).  Usage: node check.mjs TASKS.json SHOTS
import fs from "node:fs";
import path from "node:path";
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

// Packages are those of the folder in which this is started.
const packages = createRequire(pathToFileURL(path.join(process.cwd(), "package.json")));
const loaded = async (name) => (await import(pathToFileURL(packages.resolve(name)).href)).default;
const chromium = await loaded("@sparticuz/chromium");
const puppeteer = await loaded("puppeteer-core");
// What the documentation takes from the network, formulas' renderer, is answered from the package.
const CROSS = { "Access-Control-Allow-Origin": "*" };
const FROM_NPM = /^https:\/\/cdn\.jsdelivr\.net\/npm\/((?:@[^/]+\/)?[^/@]+)(?:@[^/]+)?\/([^?]+)/;
const axe = fs.readFileSync(packages.resolve("axe-core/axe.min.js"), "utf8");

const [tasks, shots] = [JSON.parse(fs.readFileSync(process.argv[2], "utf8")), process.argv[3]];
chromium.setGraphicsMode = false;
const browser = await puppeteer.launch({
  args: chromium.args.filter((a) => !["--disable-web-security", "--allow-running-insecure-content"].includes(a)),
  executablePath: await chromium.executablePath(),
  headless: "shell",
  protocolTimeout: 1_800_000, // milliseconds; the longest page takes axe minutes on a busy machine
});

const RULES = ["color-contrast", "image-alt", "svg-img-alt", "label", "link-name", "html-has-lang", "document-title"];

// How far the page is wider than its window, and the elements that stick out and do not scroll by themselves.
function tooWide(width) {
  const over = document.documentElement.scrollWidth - width; // a phone widens innerWidth to what does not fit
  if (over <= 0) return null;
  const out = [...document.body.querySelectorAll("*")].filter((e) => e.getBoundingClientRect().right > width + 1);
  return { over, elements: out.slice(0, 5).map((e) => e.outerHTML.slice(0, 120)) };
}

// Selecting a seed fades the curves of the others, in every panel; every point of a curve says seed and value.
async function selection(page) {
  const curves = await page.$$eval(".curve", (all) => all.length);
  const buttons = await page.$$('.seeds input[type="radio"]');
  const untold = await page.$$eval(".curve circle", (all) =>
    all.filter((c) => !/^seed \S+, \S+ \S+: \S+ \S+$/.test(c.querySelector("title")?.textContent ?? "")).length);
  const wrong = [];
  for (let i = 1; i < buttons.length; i++) {
    await buttons[i].click();
    const shown = await page.$$eval(".curve", (all) =>
      all.map((c) => [[...c.classList].find((k) => /^s\d+$/.test(k)), getComputedStyle(c).opacity]));
    const bad = shown.filter(([who, opacity]) => (who === `s${i - 1}`) !== (Number(opacity) === 1));
    if (bad.length) wrong.push([i - 1, bad.slice(0, 3)]);
  }
  if (buttons.length) await buttons[0].click();
  const again = await page.$$eval(".curve", (all) => all.filter((c) => getComputedStyle(c).opacity !== "1").length);
  // what is under the pointer at the place of the first point is that point, so that its title is shown
  const hit = await page.evaluate(() => {
    const point = document.querySelector(".curve circle");
    if (!point) return null;
    point.scrollIntoView({ block: "center" });
    const box = point.getBoundingClientRect();
    return document.elementFromPoint(box.x + box.width / 2, box.y + box.height / 2)?.tagName === "circle";
  });
  return { curves, buttons: buttons.length, untold, wrong, fadedForAll: again, hit };
}

for (const { file, selects, shown } of tasks) {
  for (const theme of ["light", "dark"]) {
    for (const [device, width] of [["desk", 1280], ["phone", 390]]) {
      const page = await browser.newPage();
      const [elsewhere, errors] = [[], []];
      await page.setRequestInterception(true);
      page.on("request", (r) => {
        if (/^(file|data|blob):/.test(r.url())) return r.continue();
        elsewhere.push(r.url());
        const [, name, rest] = r.url().match(FROM_NPM) ?? [];
        const file = name && path.join(process.cwd(), "node_modules", name, rest);
        if (!file || !fs.existsSync(file)) return r.abort();
        const contentType = file.endsWith(".js") ? "text/javascript" : "font/woff2";
        return r.respond({ body: fs.readFileSync(file), headers: CROSS, contentType });
      });
      page.on("pageerror", (e) => errors.push(String(e)));
      page.on("console", (m) => m.type() === "error" && errors.push(m.text()));
      await page.setViewport({ width, height: 900, isMobile: device === "phone", hasTouch: device === "phone" });
      await page.emulateMediaFeatures([{ name: "prefers-color-scheme", value: theme }]);
      await page.goto(pathToFileURL(file).href, { waitUntil: "load" });
      const found = { file, theme, device, title: await page.title(), elsewhere, errors };
      found.background = await page.evaluate(() => getComputedStyle(document.body).backgroundColor);
      found.formulas = await page.evaluate(async () => {
        const written = document.querySelectorAll(".math").length;
        if (!written) return null;
        await window.MathJax?.startup?.promise;
        const set = [...document.querySelectorAll("mjx-container")];
        return { written, set: set.length, wrong: [...document.querySelectorAll("mjx-merror")].map((e) => e.textContent) };
      });
      found.tooWide = await page.evaluate(tooWide, width);
      found.selection = selects ? await selection(page) : null;
      let violations = [];
      if (selects || device === "desk") {
        // colours and names of the documentation do not depend on the width
        await page.evaluate(axe);
        ({ violations } = await page.evaluate((rules) => axe.run({ runOnly: rules, resultTypes: ["violations"] }), RULES));
      }
      found.violations = violations.map((v) => ({
        rule: v.id,
        count: v.nodes.length,
        first: v.nodes.slice(0, 3).map((n) => `${n.html.slice(0, 160)}: ${n.failureSummary.split("\n")[1] ?? ""}`),
      }));
      if (shown) await page.screenshot({ path: path.join(shots, `${shown}-${theme}-${device}.png`), fullPage: true });
      console.log(JSON.stringify(found));
      await page.close();
    }
  }
}
await browser.close();
