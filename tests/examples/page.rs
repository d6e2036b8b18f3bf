//! The page of the server, in a real browser.

use crate::browser::{self, Browser};
use crate::support::{beside_others, ms, skipped, slack, wait_until};
use crate::{Corner, Notes, soon};
use serde_json::{Value, json};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

/// What is idle for so long goes.
const MAX_IDLE: Duration = Duration::from_secs(10);

/// The time between two looks of the server at its pool.
const LOOK: Duration = Duration::from_millis(250);

/// The server, with its page open in a browser of its own.
struct Page {
    browser: Browser,
    notes: Notes,
}

impl Page {
    /// `None`: this test cannot be made here, and has said so.
    fn open(test: &str, environment: &[(&str, &str)]) -> Option<Page> {
        let Some(program) = browser::find() else {
            skipped(test, "there is no chromium, nor chromium-headless-shell");
            return None;
        };
        let notes = Notes::start(environment);
        let mut browser = Browser::start(program);
        browser.resize(1100, 900, 1.0, false);
        browser.open(&format!("http://{}/", notes.addr));
        let mut page = Page { browser, notes };
        page.waits_for("status !== null && samples.length > 1", "the first numbers");
        Some(page)
    }

    fn waits_for(&mut self, expression: &str, what: &str) {
        let came = self.browser.waits_for(expression);
        assert!(came, "{what}: {}\n{}", self.browser.text("body"), self.browser.complaints.join("\n"));
    }

    fn press(&mut self, kind: &str) {
        self.browser.click(&format!("[data-kind={kind}]"));
    }

    /// No script has failed, and nothing was asked of anybody else.
    fn ends_well(mut self) {
        self.browser.eval("0"); // what was said before this has come
        assert!(self.browser.complaints.is_empty(), "{}", self.browser.complaints.join("\n"));
    }
}

#[test]
fn a_burst_rises_and_goes_at_once() {
    let _share = beside_others();
    let Some(mut page) = Page::open("a_burst_rises_and_goes_at_once", &[]) else { return };
    assert_eq!(page.browser.text("#health"), "ready");
    let chart = "document.querySelector('#chart').innerHTML";
    let before = page.browser.eval(chart);
    page.waits_for(&format!("{chart} !== {before}"), "the chart moves by itself");

    page.press("burst");
    page.waits_for("document.querySelector('#in-use').innerText === '17'", "17 are in use");
    page.waits_for("document.querySelectorAll('#rows tr').length >= 17", "each has its row");
    page.waits_for("document.querySelector('#rows').innerText.includes('burst-17')", "and says who uses it");
    let place = "/weather\\.rs:\\d+/.test(document.querySelector('#rows').innerText)";
    page.waits_for(place, "and from which line");
    page.waits_for("document.querySelector('#idle').innerText >= '17'", "then they are idle");
    page.waits_for("/goes in \\d/.test(document.querySelector('#rows').innerText)", "and their end is counted down");
    page.waits_for(
        "/has \\d+ sessions? of this pool/.test(document.querySelector('#server').innerText)",
        "the server's view",
    );
    page.waits_for("document.querySelector('#rows').innerText.includes('pid ')", "in each row");

    page.waits_for("document.querySelector('#idle').innerText === '0'", "they go");
    page.waits_for("document.querySelector('.mark.evicted') !== null", "and the chart says so");
    assert!(page.browser.text("#legend").contains("closed: idle too long"), "{}", page.browser.text("#legend"));

    // From the last look at which one was in use to the last at which one was idle.
    let times = "(() => { const used = samples.findLast(s => s[2] > 0)[0], idle = samples.findLast(s => s[1] > 0)[0]; \
                 return [used, idle, status.promises.late, status.promises.evicted] })()";
    let times: Vec<u64> = serde_json::from_value(page.browser.eval(times)).expect("four numbers");
    let (idle_for, late) = (ms(times[1] - times[0]), Duration::from_micros(times[2]));
    assert!(idle_for + LOOK * 2 + slack() >= MAX_IDLE, "gone after {idle_for:?}");
    assert!(idle_for <= MAX_IDLE + LOOK * 2 + slack() * 2, "gone after {idle_for:?}");
    assert!(times[3] >= 17 && late <= slack(), "{} evicted, {late:?} late", times[3]);
    let promises = page.browser.text("#promises");
    assert!(promises.contains("evictions") && promises.contains("of 20 connections"), "{promises}");

    // A page that is opened anew has what was before.
    page.browser.open(&format!("http://{}/", page.notes.addr));
    page.waits_for("document.querySelector('.mark.evicted') !== null", "history");
    page.ends_well();
}

#[test]
fn an_outage_shows_and_ends() {
    let _share = beside_others();
    let Some(mut page) = Page::open("an_outage_shows_and_ends", &[]) else { return };
    page.press("restart");
    page.waits_for("document.body.dataset.health === 'down'", "it is down");
    page.waits_for("document.querySelector('#why').innerText.includes('refused')", "and why");
    assert_eq!(page.notes.get("/ready").status, 503);
    assert_eq!(page.notes.get("/live").status, 200);
    page.waits_for(
        "document.querySelector('#server').innerText.includes('cannot be asked')",
        "nor is there another view",
    );
    page.waits_for("document.querySelector('.outage') !== null", "the chart shows it");
    page.waits_for("document.body.dataset.health === 'ready'", "it is back");
    page.waits_for("document.querySelector('#journal').innerText.includes('started again')", "and tells");
    assert_eq!(page.browser.text("#why"), "");
    assert_eq!(page.notes.get("/ready").status, 200);
    // No request was lost but those that a query cost.
    let lost = page.browser.eval("status.minute.exhausted + status.minute.unavailable + status.minute.refused");
    assert_eq!(lost, json!(0), "{}", page.browser.text("#unserved"));

    page.waits_for("status.weather.includes('restart') === false", "the restart is over");
    page.press("rotate");
    page.waits_for(
        "document.querySelector('#why').innerText.includes('password authentication failed')",
        "the refusal",
    );
    let note = page.notes.post("anybody there?");
    assert_eq!((note.status, note.body.as_str()), (500, "the database refuses this server"));
    // Silence ends this as well.
    page.press("silence");
    page.waits_for("document.body.dataset.health === 'ready'", "it was told the new password");
    assert_eq!(page.notes.post("is anybody there?").status, 201);
    page.waits_for("document.querySelector('#legend').innerText.includes('replaced')", "what was replaced");
    page.ends_well();
}

#[test]
fn a_stuck_worker_shows() {
    let _share = beside_others();
    let corner = Corner::new("examples_stuck");
    let Some(mut page) = Page::open("a_stuck_worker_shows", &[("DATABASE_URL", &corner.address())]) else { return };
    page.press("stuck");
    page.waits_for("document.querySelector('tr.long') !== null", "it has been in use for long");
    let row = page.browser.text("tr.long");
    assert!(row.contains("stuck-1") && row.contains("weather.rs:"), "{row}");
    page.waits_for("document.querySelector('tr.long').innerText.includes('idle in transaction')", "the server's view");
    // This is another's server: it is not stopped.
    for kind in ["restart", "rotate"] {
        assert_eq!(page.browser.eval(&format!("document.querySelector('[data-kind={kind}]').disabled")), json!(true));
        assert_eq!(page.notes.send("POST", &format!("/weather/{kind}"), "", "").status, 409);
    }
    page.press("silence");
    page.waits_for("document.querySelector('#in-use').innerText === '0'", "silence ends it");
    assert!(wait_until(soon(), || corner.in_transaction() == 0), "and the pool rolls back");

    // The server goes, the page stays and says so.
    page.notes.signal(rustix::process::Signal::TERM);
    page.waits_for("document.querySelector('#health').innerText === 'no answer'", "nobody answers");
    drop(page);
    assert_eq!(corner.left(), 0);
}

/// How light a colour is, such as `rgb(12, 19, 18)`.
fn lightness(colour: &Value) -> u32 {
    let colour = colour.as_str().expect("a colour");
    colour.split(|c: char| !c.is_ascii_digit()).filter_map(|n| n.parse::<u32>().ok()).take(3).sum::<u32>() / 3
}

#[test]
fn on_a_phone_and_in_the_dark() {
    let _share = beside_others();
    let corner = Corner::new("examples_phone");
    let Some(mut page) = Page::open("on_a_phone_and_in_the_dark", &[("DATABASE_URL", &corner.address())]) else {
        return;
    };
    let ground = "getComputedStyle(document.body).backgroundColor";
    let ink = "getComputedStyle(document.body).color";
    for (scheme, light) in [("light", true), ("dark", false)] {
        page.browser.prefer(scheme);
        let (ground, ink) = (lightness(&page.browser.eval(ground)), lightness(&page.browser.eval(ink)));
        assert_eq!((ground > 200, ground < 60), (light, !light), "{scheme}: {ground}");
        assert!(ground.abs_diff(ink) > 150, "{scheme}: text of {ink} on {ground}");
    }
    page.press("burst");
    page.waits_for("document.querySelectorAll('#rows tr').length >= 17", "rows");
    for width in [320, 360, 390, 768, 1400] {
        page.browser.resize(width, 800, 2.0, width < 700);
        page.waits_for("document.querySelector('#chart').childElementCount > 5", "a chart");
        let wide = page.browser.eval("document.documentElement.scrollWidth");
        assert!(wide.as_u64().is_some_and(|w| w <= u64::from(width)), "{width} is too little: {wide}");
        let cut = "[...document.querySelectorAll('button')].filter(b => b.scrollWidth > b.clientWidth + 1).length";
        assert_eq!(page.browser.eval(cut), json!(0), "buttons are cut at {width}");
    }

    // The past of another run of the server is forgotten.
    page.browser.eval("run_id = 'another'; number = 1e9; samples = [[-1, 0, 0, 0, 0, 0, 20, true, {}]]; 0");
    let anew = "run_id === status.run && number < 1e9 && samples.length > 1 && samples[0][0] >= 0";
    page.waits_for(anew, "the page begins anew");

    // What is no outage yet is said as well.
    let warning = "(() => { status.failing = { text: '3.0 s, 2 attempts, the next in 1.0 s' }; \
                   status.last_error = { text: 'refused' }; status.counts.abandoned = 2; show(); \
                   return document.querySelector('#warning').innerText })()";
    let warning = page.browser.eval(warning);
    assert_eq!(
        warning,
        "Opens fail, for 3.0 s, 2 attempts, the next in 1.0 s: refused. \
         2 connections are abandoned: their opening, check or close hangs."
    );
    page.ends_well();
}

#[test]
fn only_the_page_itself_makes_weather() {
    let corner = Corner::new("examples_weather");
    let notes = Notes::start(&[("DATABASE_URL", &corner.address())]);
    let from = |origin: &str| notes.send("POST", "/weather/silence", &format!("Origin: {origin}\r\n"), "").status;
    assert_eq!(from("http://example.com"), 403);
    assert_eq!(from("null"), 403);
    assert_eq!(from(&format!("http://{}", notes.addr)), 202);
    assert_eq!(notes.send("POST", "/weather/silence", "", "").status, 202);
    // A name that leads here, as its owner says, makes its pages no pages of ours.
    let mut stream = TcpStream::connect(notes.addr).expect("the server listens");
    let head = "POST /weather/silence HTTP/1.1\r\nHost: example.com\r\nOrigin: http://example.com\r\n\r\n";
    stream.write_all(head.as_bytes()).expect("to be heard");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("a reply");
    assert!(answer.starts_with("HTTP/1.1 403 "), "{answer}");
    // Nor may they read what is here, or write a note.
    let mut stream = TcpStream::connect(notes.addr).expect("the server listens");
    stream.write_all(b"GET /notes HTTP/1.1\r\nHost: example.com\r\n\r\n").expect("to be heard");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("a reply");
    assert!(answer.starts_with("HTTP/1.1 403 "), "{answer}");
    let headers = "Origin: http://example.com\r\nContent-Length: 4\r\n";
    assert_eq!(notes.send("POST", "/notes", headers, "four").status, 403);
    assert_eq!(notes.send("POST", "/weather/hail", "", "").status, 404);
    assert_eq!(notes.send("GET", "/weather/burst", "", "").status, 405);
    // It has an end, however often somebody asks for more.
    let mut answers = (0..7).map(|_| notes.send("POST", "/weather/burst", "", "").status);
    assert!(answers.any(|status| status == 429));
}

/// Makes `docs/page.png`, which the README shows:
///
/// ```sh
/// cargo build --examples && cargo test --test examples -- --ignored picture
/// ```
///
/// And beside it, in the target folder, how the page looks on a phone, in the dark, and in an outage.
#[test]
#[ignore = "makes a picture, and takes a minute"]
fn picture() {
    let Some(mut page) = Page::open("picture", &[]) else { return };
    let target = std::path::Path::new(env!("CARGO_TARGET_TMPDIR"));
    let begun = Instant::now();
    let at = |page: &mut Page, seconds: u64, kind: &str| {
        assert!(wait_until(begun + Duration::from_secs(120), || begun.elapsed() >= Duration::from_secs(seconds)));
        page.press(kind);
    };
    page.browser.eval("choose(60)");
    at(&mut page, 1, "burst");
    at(&mut page, 13, "steady");
    at(&mut page, 20, "restart");
    at(&mut page, 27, "stuck");
    at(&mut page, 30, "burst");
    at(&mut page, 42, "trickle");
    page.waits_for("status.now > 57000", "a minute");
    page.waits_for("document.querySelector('tr.long') !== null", "a worker that is stuck");
    // As high as it is.
    page.browser.resize(1000, 100, 1.0, false);
    let high = page.browser.eval("document.documentElement.scrollHeight").as_u64().expect("a height");
    page.browser.resize(1000, high as u32, 1.0, false);
    page.browser.eval("scrollTo(0, 0)");
    std::fs::write(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/page.png"), page.browser.picture()).expect("a file");
    page.browser.prefer("dark");
    std::fs::write(target.join("dark.png"), page.browser.picture()).expect("a file");
    page.browser.resize(390, 1900, 2.0, true);
    page.waits_for("document.querySelector('#chart').childElementCount > 5", "a chart");
    std::fs::write(target.join("phone.png"), page.browser.picture()).expect("a file");
    page.press("rotate");
    page.waits_for("document.body.dataset.health === 'down'", "it is down");
    page.browser.prefer("light");
    page.browser.resize(1000, 900, 1.0, false);
    page.browser.eval("scrollTo(0, 0)");
    page.waits_for("document.querySelector('.outage') !== null", "the chart shows it");
    std::fs::write(target.join("down.png"), page.browser.picture()).expect("a file");
    page.ends_well();
}
