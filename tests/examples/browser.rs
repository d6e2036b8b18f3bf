//! A real browser without a window, told what to do over a pair of pipes (`--remote-debugging-pipe`): no port, no
//! WebSocket, and no browser that outlives its test, since it ends with its pipe.

use crate::soon;
use crate::support::{SOON, wait_until};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use tempfile::TempDir;

/// The browser talks on the file descriptors 3 and 4, which only a shell can give it.
const SHELL: &str = r#"exec "$@" 3<&0 4>&1 </dev/null >/dev/null 2>&1"#;

const FLAGS: &[&str] = &[
    "--headless",
    "--remote-debugging-pipe",
    // In a container, and as root, it has none.
    "--no-sandbox",
    "--disable-dev-shm-usage",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-extensions",
    "--hide-scrollbars",
];

/// The browser's program, if there is one.
pub(crate) fn find() -> Option<&'static str> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let names = ["chromium-headless-shell", "chromium", "chromium-browser", "google-chrome"];
    names.into_iter().find(|name| std::env::split_paths(&path).any(|folder| folder.join(name).is_file()))
}

/// A browser with one page. Killed when it is dropped.
pub(crate) struct Browser {
    child: Child,
    orders: Option<ChildStdin>,
    /// Answers and events, as they come.
    said: Receiver<Value>,
    orders_given: u64,
    session: Option<String>,
    /// What a person would see as an error in the console.
    pub(crate) complaints: Vec<String>,
    _profile: TempDir,
}

impl Browser {
    pub(crate) fn start(program: &str) -> Browser {
        let profile = tempfile::Builder::new().prefix("millpond-browser-").tempdir().expect("a folder");
        let mut child = Command::new("/bin/sh")
            .args(["-c", SHELL, "browser", program])
            .args(FLAGS)
            .arg(format!("--user-data-dir={}", profile.path().display()))
            .arg("about:blank")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("a shell for the browser");
        let orders = child.stdin.take();
        let mut answers = BufReader::new(child.stdout.take().expect("its pipe"));
        let (tell, said) = channel();
        // It ends when the browser does.
        thread::spawn(move || {
            let mut bytes = Vec::new();
            while answers.read_until(0, &mut bytes).is_ok_and(|n| n > 0) {
                bytes.pop();
                let message = serde_json::from_slice(&bytes).expect("the browser speaks JSON");
                bytes.clear();
                if tell.send(message).is_err() {
                    return;
                }
            }
        });
        let mut browser =
            Browser { child, orders, said, orders_given: 0, session: None, complaints: Vec::new(), _profile: profile };
        let target = browser.order("Target.createTarget", json!({ "url": "about:blank" }));
        let attached =
            browser.order("Target.attachToTarget", json!({ "targetId": target["targetId"], "flatten": true }));
        browser.session = Some(attached["sessionId"].as_str().expect("a session").to_owned());
        for domain in ["Runtime", "Log", "Page", "Network"] {
            browser.order(&format!("{domain}.enable"), json!({}));
        }
        browser
    }

    /// Gives an order, and waits for its answer.
    pub(crate) fn order(&mut self, method: &str, params: Value) -> Value {
        self.orders_given += 1;
        let id = self.orders_given;
        let mut order = json!({ "id": id, "method": method, "params": params });
        if let Some(session) = &self.session {
            order["sessionId"] = json!(session);
        }
        let pipe = self.orders.as_mut().expect("open until the drop");
        write!(pipe, "{order}\0").and_then(|()| pipe.flush()).expect("the browser listens");
        loop {
            let message = self.said.recv_timeout(SOON).unwrap_or_else(|e| panic!("{method} has no answer: {e}"));
            if message["id"] == json!(id) {
                assert!(message["error"].is_null(), "{method}: {}", message["error"]);
                return message["result"].clone();
            }
            self.note(&message);
        }
    }

    fn note(&mut self, event: &Value) {
        let params = &event["params"];
        let complaint = match event["method"].as_str().unwrap_or_default() {
            "Runtime.exceptionThrown" => &params["exceptionDetails"],
            "Log.entryAdded" if params["entry"]["level"] == "error" => &params["entry"],
            "Runtime.consoleAPICalled" if params["type"] == "error" => params,
            // Whatever is fetched comes from the page's own server, or stands in the page.
            "Network.requestWillBeSent" => {
                let url = params["request"]["url"].as_str().unwrap_or_default();
                if url.starts_with("http://127.0.0.1:") || url.starts_with("data:") || url.starts_with("about:") {
                    return;
                }
                params
            }
            _ => return,
        };
        self.complaints.push(complaint.to_string());
    }

    /// A window of this size, as a phone or a desk has it.
    pub(crate) fn resize(&mut self, width: u32, height: u32, scale: f64, phone: bool) {
        let size = json!({ "width": width, "height": height, "deviceScaleFactor": scale, "mobile": phone });
        self.order("Emulation.setDeviceMetricsOverride", size);
    }

    pub(crate) fn prefer(&mut self, scheme: &str) {
        let features = json!({ "features": [{ "name": "prefers-color-scheme", "value": scheme }] });
        self.order("Emulation.setEmulatedMedia", features);
    }

    pub(crate) fn open(&mut self, url: &str) {
        let opened = self.order("Page.navigate", json!({ "url": url }));
        assert!(opened["errorText"].is_null(), "{url}: {}", opened["errorText"]);
        assert!(self.waits_for("document.readyState === 'complete'"), "{url} is not loaded");
    }

    /// The value of an expression in the page.
    pub(crate) fn eval(&mut self, expression: &str) -> Value {
        let asked = json!({ "expression": expression, "returnByValue": true, "awaitPromise": true });
        let answer = self.order("Runtime.evaluate", asked);
        assert!(answer["exceptionDetails"].is_null(), "{expression}: {}", answer["exceptionDetails"]);
        answer["result"]["value"].clone()
    }

    pub(crate) fn text(&mut self, selector: &str) -> String {
        let text = self.eval(&format!("document.querySelector({}).innerText", json!(selector)));
        text.as_str().unwrap_or_default().to_owned()
    }

    /// Waits until an expression is true in the page.
    #[must_use = "it may not have become true"]
    pub(crate) fn waits_for(&mut self, expression: &str) -> bool {
        wait_until(soon(), || self.eval(expression) == json!(true))
    }

    pub(crate) fn click(&mut self, selector: &str) {
        // As a finger would: what is hidden, covered or disabled is not pressed.
        let place = self.eval(&format!(
            "(() => {{ const e = document.querySelector({}); e.scrollIntoView({{ block: 'center' }}); \
             const r = e.getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2] }})()",
            json!(selector)
        ));
        for kind in ["mousePressed", "mouseReleased"] {
            let press = json!({ "type": kind, "x": place[0], "y": place[1], "button": "left", "clickCount": 1 });
            self.order("Input.dispatchMouseEvent", press);
        }
    }

    /// The page as a PNG.
    pub(crate) fn picture(&mut self) -> Vec<u8> {
        let picture = self.order("Page.captureScreenshot", json!({ "format": "png" }));
        decode(picture["data"].as_str().expect("a picture"))
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        // Its own processes end with it. It ends by itself with its pipe; this is for the case that it hangs.
        drop(self.orders.take());
        if !wait_until(soon(), || matches!(self.child.try_wait(), Ok(Some(_)) | Err(_))) {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

/// Base64.
fn decode(text: &str) -> Vec<u8> {
    let value = |c: u8| match c {
        b'A'..=b'Z' => c - b'A',
        b'a'..=b'z' => c - b'a' + 26,
        b'0'..=b'9' => c - b'0' + 52,
        b'+' => 62,
        b'/' => 63,
        _ => panic!("no base64: {c}"),
    };
    let digits: Vec<u32> = text.trim_end_matches('=').bytes().map(|c| u32::from(value(c))).collect();
    let group = |four: &[u32]| {
        let bits = four.iter().fold(0, |bits, digit| bits << 6 | digit) << (6 * (4 - four.len()));
        bits.to_be_bytes()[1..four.len()].to_vec()
    };
    digits.chunks(4).flat_map(group).collect()
}
