//! Servers for one connection, which do what a script says and return what they received.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::thread::{self, JoinHandle};
use std::time::Duration;

pub(super) struct Fake<R> {
    port: u16,
    thread: JoinHandle<R>,
}

impl<R: Send + 'static> Fake<R> {
    /// Serves one connection. Hangs up on a client that is silent for 10 s.
    pub(super) fn new(script: impl FnOnce(TcpStream) -> R + Send + 'static) -> Fake<R> {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        Fake {
            port: listener.local_addr().unwrap().port(),
            thread: thread::spawn(move || {
                let (stream, _) = listener.accept().unwrap();
                stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
                script(stream)
            }),
        }
    }

    pub(super) fn port(&self) -> u16 {
        self.port
    }

    /// A connection string for this server. It has name and address, so that no resolver is asked.
    pub(super) fn config(&self, more: &str) -> String {
        format!("host=db.test hostaddr=127.0.0.1 port={} user=alice password=secret {more}", self.port)
    }

    /// What the script returned. The client must be gone, or go without waiting for the script.
    pub(super) fn result(self) -> R {
        self.thread.join().unwrap()
    }
}

/// The next message: `ssl?`, `tls`, `startup <user>`, `password <it>`, or the tag of another one. `None` at the end.
pub(super) fn read_message(stream: &mut TcpStream) -> Option<String> {
    let mut head = [0; 5];
    stream.read_exact(&mut head).ok()?;
    let (kind, length) = match head[0] {
        0 => ("startup", u32::from_be_bytes(head[..4].try_into().unwrap()) as usize - 5),
        0x16 => ("tls", u16::from_be_bytes(head[3..].try_into().unwrap()) as usize),
        _ => ("tagged", u32::from_be_bytes(head[1..].try_into().unwrap()) as usize - 4),
    };
    let mut body = vec![0; length];
    stream.read_exact(&mut body).ok()?;
    let words = String::from_utf8_lossy(&body);
    let mut words = words.split('\0');
    Some(match (kind, head[0]) {
        ("tls", _) => "tls".into(),
        ("startup", _) if length == 3 => "ssl?".into(),
        ("startup", _) => {
            words.find(|&word| word == "user");
            format!("startup {}", words.next().unwrap())
        }
        (_, b'p') => format!("password {}", words.next().unwrap()),
        (_, tag) => char::from(tag).into(),
    })
}

/// Reads all that a client sends it. Answers the request for TLS with `reply` (or hangs up if that is empty), answers
/// the startup packet by asking for the password in clear text, and hangs up after the next message.
pub(super) fn interrogate(mut stream: TcpStream, reply: &[u8]) -> Vec<String> {
    let mut received = Vec::new();
    while let Some(message) = read_message(&mut stream) {
        let answer = match message.as_str() {
            "ssl?" => reply,
            "startup alice" => b"R\0\0\0\x08\0\0\0\x03",
            _ => b"",
        };
        received.push(message);
        if answer.is_empty() || stream.write_all(answer).is_err() {
            break;
        }
    }
    received
}

/// Lets a client in, as the backend `pid` with the transaction status `status`.
pub(super) fn let_in(stream: &mut (impl Read + Write + ?Sized), pid: i32, status: u8) {
    let mut length = [0; 4];
    stream.read_exact(&mut length).unwrap();
    let mut startup = vec![0; u32::from_be_bytes(length) as usize - 4];
    stream.read_exact(&mut startup).unwrap();
    let key = [&pid.to_be_bytes()[..], b"keys"].concat();
    let words = [(b'R', &[0; 4][..]), (b'K', &key), (b'Z', &[status])];
    stream.write_all(&words.map(|(tag, body)| message(tag, body)).concat()).unwrap();
}

/// A message of the backend.
pub(super) fn message(tag: u8, body: &[u8]) -> Vec<u8> {
    [&[tag][..], &(body.len() as u32 + 4).to_be_bytes(), body].concat()
}
